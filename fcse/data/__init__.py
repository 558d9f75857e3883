"""Text and human judgements by name: packaged with a dependency, a local path, or the hub."""

from fcse.data.assets import (
    HUB_DATASET,
    LEE_DOCUMENTS,
    LEE_JUDGEMENTS,
    MINILM,
    WIKI_MINI,
    PackagedFile,
    cache_folder,
    download,
    hub_reachable,
    is_file,
    is_folder,
    sha256,
)
from fcse.data.judgements import (
    STS_SUBSETS,
    STS_TASKS,
    SentencePairs,
    load_lee,
    load_sts,
    senteval_folder,
)
from fcse.data.text import (
    article_batch,
    corpus_reader,
    load_corpus,
    load_wiki_articles,
    spread,
    text_hash,
)

__all__ = [
    "HUB_DATASET",
    "LEE_DOCUMENTS",
    "LEE_JUDGEMENTS",
    "MINILM",
    "STS_SUBSETS",
    "STS_TASKS",
    "WIKI_MINI",
    "PackagedFile",
    "SentencePairs",
    "article_batch",
    "cache_folder",
    "corpus_reader",
    "download",
    "hub_reachable",
    "is_file",
    "is_folder",
    "load_corpus",
    "load_lee",
    "load_sts",
    "load_wiki_articles",
    "senteval_folder",
    "sha256",
    "spread",
    "text_hash",
]
