"""What ingest made: pages, and the questions and the index that belong to them."""

from tasks.artifact import Artifact, read_batches, read_provenance
from tasks.config import Agent
from tasks.errors import ArtifactError, ConfigError
from tasks.refs import load_ref


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


def refuse_without_images(root: str, agent: Agent) -> None:
    """An agent that is to see page images, and finds pages of which none can have one, would silently be one that reads text.

    Raises:
        ArtifactError: nothing was ingested yet.
        ConfigError: the agent is to see images, and no page has a PDF.
    """
    if not agent.sees_images:
        return
    sources = (table["source_uri"] for table in read_batches(load_ref(root, "pages"), ["source_uri"]))
    if all(column.null_count == len(column) for column in sources):
        raise ConfigError(
            f"the agent is to see page images (observation {agent.observation}), and none of the pages has a PDF: ingest the "
            "PDFs too (drag ingest --documents FOLDER --ocr-file FILE), or take --observation text"
        )
