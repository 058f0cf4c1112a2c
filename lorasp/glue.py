"""GLUE's tasks (Wang et al. 2018, arXiv 1804.07461): where their files and columns are, their labels and metrics.

Columns are those of the archives' TSV files; in one without a header (CoLA's) they are places from 0. Names of the
hub's columns and the order of its labels are those of `nyu-mll/glue`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """directory: of the archive. sentences, label: columns of its TSV files. hub_sentences: of the hub's rows, whose
    label is a number, in the order of `labels`. labels: as the files spell them; none: a number from 0 to 5. dev: of
    each set that is reported, its name, its file (without .tsv) and its split on the hub. metrics: of
    evaluation/glue_metrics.py, the first of them the one that the paper's Table 1 has. may_end_early: the archive
    itself has rows that lack columns (QQP's), which the hub's copy leaves out.
    """

    directory: str
    sentences: tuple[str, ...] | tuple[int, ...]
    label: str | int
    hub_sentences: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    dev: tuple[tuple[str, str, str], ...] = (("reported", "dev", "validation"),)
    may_end_early: bool = False

    @property
    def has_header(self) -> bool:
        return isinstance(self.label, str)

    @property
    def is_regression(self) -> bool:
        return not self.labels


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE = {
    "cola": GlueTask("CoLA", (3,), 1, ("sentence",), ("0", "1"), ("matthews",)),
    "sst2": GlueTask("SST-2", ("sentence",), "label", ("sentence",), ("0", "1"), ("accuracy",)),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", _PAIR, ("0", "1"), ("accuracy", "f1")),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("question1", "question2"),
        ("0", "1"),
        ("accuracy", "f1"),
        may_end_early=True,
    ),
    "stsb": GlueTask("STS-B", _PAIR, "score", _PAIR, (), ("pearson", "spearman")),
    "mnli": GlueTask(
        "MNLI",
        _PAIR,
        "gold_label",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        (
            ("reported", "dev_matched", "validation_matched"),
            ("reported_mismatched", "dev_mismatched", "validation_mismatched"),
        ),
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
    "rte": GlueTask("RTE", _PAIR, "label", _PAIR, _ENTAILMENT, ("accuracy",)),
    "wnli": GlueTask("WNLI", _PAIR, "label", _PAIR, ("0", "1"), ("accuracy",)),
}
