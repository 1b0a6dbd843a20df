"""Write the sample collection."""

import argparse
from pathlib import Path

from tasks.sample import write_sample

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tasks.sample", description=__doc__)
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="where it is written: pdfs/ and two files of questions"
    )
    print(write_sample(parser.parse_args().folder))
