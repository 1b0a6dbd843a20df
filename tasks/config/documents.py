"""Settings of what is searched: documents, index, queries."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tasks.config.base import Settings, Share

MOST_OCR_BELOW = 1000


class Scans(Settings):
    """Pages without a text layer, and how Tesseract reads them."""

    ocr: Literal["auto", "off"] = Field(
        default="auto",
        title="OCR",
        description="'auto' reads pages without a text layer; 'off' leaves them without text.",
    )
    ocr_language: str = Field(
        default="eng",
        title="OCR language",
        pattern=r"^[A-Za-z0-9_/]+(\+[A-Za-z0-9_/]+)*$",
        description="Tesseract's names of the languages that the pages are written in, such as eng or eng+deu.",
    )
    ocr_dpi: int = Field(
        default=200,
        ge=72,
        le=600,
        title="OCR resolution",
        description="Pixels an inch that pages are rendered at for OCR.",
    )
    ocr_below: int = Field(
        default=100,
        ge=1,
        le=MOST_OCR_BELOW,
        title="OCR below",
        description="A page with pictures and fewer characters than these in its text layer, spaces not counted, counts as without one.",
    )


class Ingest(Settings):
    """PDFs, OCR text or both, and questions → pages, questions with splits, and what was set aside."""

    documents: str | None = Field(
        default=None, description="Folder or s3:// prefix of PDFs; empty where there is only an OCR file."
    )
    ocr_file: str | None = Field(
        default=None,
        title="OCR file",
        description="JSONL of {file, page_number, total_pages, text}, a page a line. Given with documents, its texts take the place of those of the PDFs, of which 'file' is the path below the folder.",
    )
    questions: str | None = Field(
        default=None,
        description="Questions with known pages: a .jsonl or .parquet file, or hf:NAME[@REVISION][#CONFIG][:SPLIT] for a Hugging Face data set.",
    )
    train_ratio: Share = Field(default=0.6, description="Share of document groups whose questions are for training.")
    dev_ratio: Share = Field(
        default=0.1, description="Share of document groups for choosing settings; what is left is for testing."
    )
    split_salt: str = Field(
        default="drag", description="Changes which documents fall into which split. Keep it to keep the split."
    )
    include_json: str | None = Field(
        default=None,
        title="Include only",
        description="JSON file, a list of document names or question ids: only these questions are kept.",
    )
    exclude_json: str | None = Field(
        default=None,
        title="Exclude",
        description="JSON file, a list of document names or question ids: these questions are dropped.",
    )
    scans: Scans = Field(default=Scans(), title="Scans", description="How pages without a text layer are read.")
    workers: int | None = Field(
        default=None, ge=1, description="Processes that read PDFs and scans; one per core when empty."
    )

    @field_validator("documents")
    @classmethod
    def _are_pdfs(cls, documents: str | None) -> str | None:
        if documents and documents.lower().endswith(".jsonl"):
            raise ValueError("documents are a folder of PDFs: give OCR text as ocr_file (--ocr-file)")
        return documents

    @model_validator(mode="after")
    def _has_pages(self) -> "Ingest":
        if not self.documents and not self.ocr_file:
            raise ValueError(
                "nothing is to be read: give a folder of PDFs (documents, --documents), their OCR text (ocr_file, --ocr-file), "
                "or both"
            )
        return self

    @model_validator(mode="after")
    def _ratios(self) -> "Ingest":
        if self.train_ratio + self.dev_ratio > 1:
            raise ValueError("train_ratio and dev_ratio add up to more than 1")
        return self


class Index(Settings):
    """How pages are indexed."""

    engine: Literal["tantivy", "whoosh"] = Field(
        default="tantivy", description="tantivy is fast; whoosh is the reference. Both match the same pages."
    )


class Search(Settings):
    """How a query is read and answered."""

    operator: Literal["or", "and"] = Field(
        default="or",
        description="What joins words that no operator joins: ranked OR, or AND as the reference pipeline.",
    )
    expand: Literal["none", "question"] = Field(
        default="none", description="'question' adds the question's words to a query that has no operators."
    )
    file_boost: float = Field(
        default=1.0, ge=0, description="Weight of a match in the file name's words; 0 leaves them out."
    )
    title_boost: float = Field(
        default=1.0, ge=0, description="Weight of a match in the PDF title's words; 0 leaves them out."
    )
