"""Run directories and artifacts: written atomically, proven before use. Imports no torch."""

from rlhf.store.evaluation import NO_VERDICT, find_evaluation
from rlhf.store.files import cache_root, private_directory
from rlhf.store.jsonio import (
    canonical_json,
    fingerprint,
    jsonable,
    pretty_json,
    read_json,
    write_json_atomic,
    write_text_atomic,
)
from rlhf.store.layout import RunDir
from rlhf.store.manifest import (
    CARD,
    MANIFEST,
    FileRecord,
    Manifest,
    ParentRecord,
    read_manifest,
    verify,
)
from rlhf.store.publishing import amend, library_versions, make_once, publish
from rlhf.store.tokenizer import tokenizer_fingerprint

__all__ = [
    "CARD",
    "MANIFEST",
    "NO_VERDICT",
    "FileRecord",
    "Manifest",
    "ParentRecord",
    "RunDir",
    "amend",
    "cache_root",
    "canonical_json",
    "find_evaluation",
    "fingerprint",
    "jsonable",
    "library_versions",
    "make_once",
    "pretty_json",
    "private_directory",
    "publish",
    "read_json",
    "read_manifest",
    "tokenizer_fingerprint",
    "verify",
    "write_json_atomic",
    "write_text_atomic",
]
