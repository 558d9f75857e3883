"""Memory and time of tokenising a corpus once, and of drawing batches from it, by its size.

Each text file is made of words of the packaged Wikipedia slice, 4 to 16 a sentence. One fresh
process tokenises it and draws batches; a second one opens what the first left and draws again.

    python benchmarks/corpus_memory.py                  # about half an hour on two busy cores
    python benchmarks/corpus_memory.py 10000 100000     # other sizes
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fcse.data import load_corpus
from fcse.encoder import SentenceEncoder
from fcse.training.corpora import TokenizedCorpus, row_batches

SIZES = (10_000, 100_000, 1_000_000, 5_000_000)
BATCH, BATCHES, LENGTH = 64, 200, 32
MB = 1e6


def make_text(path: Path, size: int) -> None:
    words = np.array(" ".join(load_corpus("wiki-mini")).split(), dtype=object)
    generator = np.random.default_rng(size)
    with path.open("w", encoding="utf-8") as file:
        for start in tqdm(range(0, size, 10_000), f"making {size:,}", leave=False):
            lengths = generator.integers(4, 17, min(10_000, size - start))
            drawn = iter(generator.choice(words, lengths.sum()))
            file.writelines(" ".join(next(drawn) for _ in range(n)) + "\n" for n in lengths)


class Memory(threading.Thread):
    """Peaks in bytes, from what Linux tells of a process: all resident pages, and anonymous ones.

    Pages of a mapped file are resident too, as long as nobody else needs the room.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = {"VmHWM": 0, "RssAnon": 0}

    def sample(self) -> None:
        status = Path("/proc/self/status").read_text()
        for name, peak in self.peaks.items():
            (kib,) = re.findall(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
            self.peaks[name] = max(peak, int(kib) * 1024)

    def run(self) -> None:
        while True:
            self.sample()
            time.sleep(0.02)


def measure(text: str, cache: str) -> None:
    """In a process of its own: one line of JSON with what loading and drawing took."""
    encoder = SentenceEncoder.from_pretrained("minilm")
    memory = Memory()
    memory.start()
    started = time.perf_counter()
    corpus = TokenizedCorpus.load(text, encoder, LENGTH, cache)
    loaded = time.perf_counter()
    for rows in row_batches(len(corpus), BATCH, BATCHES, seed=0):
        corpus.batch(rows)
    drawn = time.perf_counter()
    memory.sample()
    print(json.dumps({"load": loaded - started, "draw": drawn - loaded} | memory.peaks))


def main(sizes: list[int]) -> None:
    print(
        "| sentences | text MB | file MB | tokenised in s | sentences/s | opened in s "
        f"| {BATCHES} batches s | peak RSS MB, tokenising | of it anonymous "
        "| peak RSS MB, drawing | of it anonymous |"
    )
    print("|" + "---:|" * 11)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            text, cache = Path(folder) / "corpus.txt", Path(folder) / "cache"
            make_text(text, size)
            command = [sys.executable, __file__, "measure", str(text), str(cache)]
            first, second = (
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                for _ in range(2)
            )
            (file,) = cache.glob("*.arrow")
            cells = [
                f"{size:,}",
                *(f"{path.stat().st_size / MB:,.0f}" for path in (text, file)),
                f"{first['load']:.1f}",
                f"{size / first['load']:,.0f}",
                *(f"{second[what]:.1f}" for what in ("load", "draw")),
                *(
                    f"{x / MB:,.0f}"
                    for run in (first, second)
                    for x in (run["VmHWM"], run["RssAnon"])
                ),
            ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
    else:
        main([int(size) for size in sys.argv[1:]] or list(SIZES))
