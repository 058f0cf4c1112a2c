"""The paper's figures: Wu et al. (2024), Tables 1 to 3, row by row as they are printed."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """number: of the row, from 1. trained: parameters in millions, as printed. scores: in %, by `PaperTable.columns`.

    method: `full`, `lora`, `lorasp`.
    """

    table: int
    number: int
    model: str
    method: str
    trained: float
    scores: Mapping[str, float]

    @property
    def place(self) -> str:
        return f"Table {self.table}, row {self.number}"


@dataclass(frozen=True)
class PaperTable:
    """columns: name of a score -> its header. averages: whether the text gives a mean over the columns."""

    number: int
    title: str
    columns: Mapping[str, str]
    rows: tuple[PaperRow, ...]
    averages: bool = False


@dataclass(frozen=True)
class PaperModel:
    """shape: its name in models/shapes. parameters: all of them, of a classifier with two labels' head."""

    shape: str
    parameters: int


MODELS = {
    "RoBERTa-base": PaperModel("roberta-base", 124_647_170),
    "RoBERTa-large": PaperModel("roberta-large", 355_361_794),
    "T5-base": PaperModel("t5-base", 222_903_552),
    "T5-large": PaperModel("t5-large", 737_668_096),
    "LLaMA-7B": PaperModel("llama-7b", 6_738_415_616),
    "LLaMA-13B": PaperModel("llama-13b", 13_015_864_320),
}


def _table(number: int, title: str, columns: dict[str, str], lines: str, **more: bool) -> PaperTable:
    """lines: model, method, trained parameters in millions, and the scores in the columns' order, of each row."""
    rows = []
    for place, line in enumerate(lines.strip().splitlines(), start=1):
        model, method, trained, *scores = line.split()
        values = dict(zip(columns, map(float, scores), strict=True))
        rows.append(PaperRow(number, place, model, method, float(trained), values))
    return PaperTable(number, title, columns, tuple(rows), **more)


TABLES = {
    # The first column is headed "MNKL" there. Matthews correlation for CoLA, Pearson's for STS-B, accuracy for all
    # others; whether MNLI's is matched or mismatched the paper leaves open.
    1: _table(
        1,
        "RoBERTa on GLUE",
        {
            "mnli": "MNLI",
            "sst2": "SST-2",
            "mrpc": "MRPC",
            "cola": "CoLA",
            "qnli": "QNLI",
            "qqp": "QQP",
            "rte": "RTE",
            "stsb": "STS-B",
        },
        """
        RoBERTa-base   full    121.3  86.5 92.1 91.3 58.9 91.2 90.9 69.8 89.9
        RoBERTa-base   lora    0.9    86.7 93.4 90.6 62.4 92.3 88.9 70.2 90.3
        RoBERTa-base   lorasp  0.45   86.2 93.6 91.1 62.5 91.4 90.4 70.3 90.2
        RoBERTa-large  full    348    89.7 95.6 92.2 65.9 93.4 90.2 82.3 92.1
        RoBERTa-large  lora    1.8    90.3 96.5 91.2 65.6 93.6 91.3 82.1 91.3
        RoBERTa-large  lorasp  0.9    90.4 96.4 92.3 66.2 93.7 91.3 82.5 92.3
        """,
        averages=True,
    ),
    2: _table(
        2,
        "T5 on WMT16 English to Romanian",
        {"bleu": "BLEU", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"},
        """
        T5-base   full    218.8  31.5 42.6 28.9 40.3
        T5-base   lora    0.9    30.9 43.3 27.6 40.6
        T5-base   lorasp  0.45   31.2 43.7 27.8 39.8
        T5-large  full    725.4  33.4 51.2 33.2 47.3
        T5-large  lora    2.29   33.6 50.9 32.8 47.1
        T5-large  lorasp  1.15   33.5 51.3 33.6 47.5
        """,
    ),
    # The fourth row is headed "LLaMA-7B" there, with the 13B's number of parameters.
    3: _table(
        3,
        "LLaMA after Alpaca, 5-shot MMLU",
        {"mmlu": "MMLU"},
        """
        LLaMA-7B   full    6624.4   39.8
        LLaMA-7B   lora    157.3    38.9
        LLaMA-7B   lorasp  78.7     39.0
        LLaMA-13B  full    12986.8  47.8
        LLaMA-13B  lora    248.6    45.3
        LLaMA-13B  lorasp  124.3    45.4
        """,
    ),
}


def paper_row(table: int, model: str, method: str) -> PaperRow | None:
    return next((row for row in TABLES[table].rows if (row.model, row.method) == (model, method)), None)
