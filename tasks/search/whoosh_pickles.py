"""Nothing in a stored Whoosh index is run: of the classes that its pickles name, only those that Whoosh writes are looked up.

Whoosh keeps the list of segments, tables of field names and blocks of postings as pickles, and a pickle may name any function
of any module and have it called. An index is downloaded from storage that others may write to. Whoosh unpickles in a dozen
places and offers no setting, but every unpickler of Python tells an audit hook of a name before it looks it up
(https://docs.python.org/3/library/pickle.html#pickle.Unpickler.find_class), so one hook covers all of them.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator

from tasks.errors import ArtifactError

# what whoosh3, the codec of every index that is built here, writes; a schema is not read from the index
_WRITTEN = {
    ("whoosh.codec.whoosh3", "W3Segment"),
    ("whoosh.codec.whoosh3", "W3Codec"),
    ("collections", "defaultdict"),
    ("builtins", "int"),
    ("_codecs", "encode"),  # bytes, in a pickle of protocol 2
}
_thread = threading.local()


@contextlib.contextmanager
def only_what_whoosh_writes() -> Iterator[None]:
    """What this thread unpickles in the block names nothing but Whoosh's own classes.

    Raises:
        ArtifactError: a pickle names something else; it was not looked up.
    """
    _thread.reads_index = True
    try:
        yield
    finally:
        _thread.reads_index = False


def _look(event: str, named: tuple[object, ...]) -> None:
    if event == "pickle.find_class" and getattr(_thread, "reads_index", False) and named not in _WRITTEN:
        raise ArtifactError(
            f"the search index names {named[0]}.{named[1]}, which Whoosh writes into no index: it was altered, and is not read;"
            " delete it, find out who can write to the storage, and run the stage again"
        )


sys.addaudithook(_look)  # for good: Python takes no hook back
