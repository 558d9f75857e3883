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
    runs_folder,
    sha256,
    versions,
)
from fcse.data.judgements import (
    STS_SUBSETS,
    STS_TASKS,
    Aggregate,
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
