"""Write the sample collection.

python -m tasks.sample FOLDER
"""

import sys
from pathlib import Path

from tasks.sample import write_sample

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tasks.sample FOLDER")
    print(write_sample(Path(sys.argv[1])))
