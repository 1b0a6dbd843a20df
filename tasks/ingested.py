"""What ingest made: pages, and the questions and the index that belong to them."""

from tasks.artifact import Artifact, load_ref, read_provenance
from tasks.errors import ArtifactError


def load_ingested(root: str, *names: str) -> dict[str, Artifact]:
    """Those of "pages", "questions" and "index" that are asked for, all of the newest pages.

    Ingest points its references to what it made one after the other: in between, or when it was killed there, the index
    knows nothing of new pages, and rollouts would be paid for in vain.

    Raises:
        ArtifactError: nothing was ingested yet, or what is there was made of other pages.
    """
    found = {name: load_ref(root, name) for name in names}
    pages = load_ref(root, "pages")
    for name, made in found.items():
        of = made.sha256 if name == "pages" else read_provenance(made).get("inputs", {}).get("pages", pages.sha256)
        if of != pages.sha256:
            raise ArtifactError(
                f"{root} holds {name} of other pages than the newest: an ingest is under way, or was broken off; wait until it "
                "ends, or run it again"
            )
    return found
