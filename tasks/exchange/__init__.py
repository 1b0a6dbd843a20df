"""What DRAG takes from others and gives to them: the reference pipeline's JSONL, Hugging Face data sets, PEFT adapters.

trajectories.py  read   a rollout of another pipeline → a row of trajectories, its conversation told anew
training_sets.py read   the reference's training JSONL → rows of training sets; and the way back
rows.py          read   our own rows, out of JSONL or Parquet
adapter.py       read   a LoRA adapter in PEFT's layout
images.py        both  page images that go along with rows
export.py        write  tables as JSONL or as a data set, and adapters
target.py        both  the folder that an export goes to
exported.py      read   what an export says of its tables
card.py          write  the data set's card
importing.py     read   the stage that chooses among these
"""
