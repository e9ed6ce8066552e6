"""The benchmarks that run without a hub: lm-eval's name, where its task file lies, and how rows may be written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gaintune.evaluate.benchmarks.rows import forms
from gaintune.evaluate.benchmarks.rows.forms import Form, normalised

MMLU_COLUMNS = ("question", "choices", "answer")
MMLU_FOLDER = "mmlu/default"
MMLU_PREFIX = "mmlu_"


@dataclass(frozen=True)
class OfflineTask:
    """One benchmark of lm-eval that can read local rows.

    Attributes:
        name: lm-eval's name of the task.
        folder: where in lm-eval's tasks its file lies; reading all of them takes long.
        forms: how its rows may be written; of several that fit, the first one counts.
        embedded: data set in the embedded package, None where it is not in there.
        known_as: further names that a folder or file of its rows may have.
    """

    name: str
    folder: str
    forms: tuple[Form, ...]
    embedded: str | None = None
    known_as: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What a folder or file of its rows may be called."""
        return (self.name, *self.known_as)


def _arc(name: str, data: str) -> OfflineTask:
    rows = (Form(("question", "choices", "answerKey")), normalised(forms.lettered("question")))
    return OfflineTask(name, "arc", rows, f"ai2_arc/{data}")


def _gsm8k(name: str) -> OfflineTask:
    rows = (Form(("question", "answer")), Form(("prompt", "completion"), forms.exchange))
    return OfflineTask(name, "gsm8k", rows, known_as=("gsm8k",))


def _lambada(name: str) -> OfflineTask:
    return OfflineTask(name, "lambada", (Form(("text",)),), known_as=("lambada",))


TASKS: dict[str, OfflineTask] = {
    task.name: task
    for task in (
        _arc("arc_easy", "ARC-Easy"),
        _arc("arc_challenge", "ARC-Challenge"),
        OfflineTask(
            "boolq",
            "super_glue",
            (
                Form(("passage", "question", "label")),
                Form(("passage", "question", "answer"), forms.passage_and_answer, "passages without their titles"),
                normalised(forms.passage),
            ),
            "boolq/none",
        ),
        OfflineTask(
            "hellaswag",
            "hellaswag",
            (
                Form(("activity_label", "ctx_a", "ctx_b", "endings", "label")),
                normalised(
                    forms.ending,
                    note="texts as the rows have them, not as lm-eval cleans the Hub's",
                    changes={"process_docs": None},
                ),
            ),
            "hellaswag/none",
        ),
        OfflineTask(
            "openbookqa",
            "openbookqa",
            (Form(("question_stem", "choices", "answerKey")), normalised(forms.lettered("question_stem"))),
            "openbookqa/main",
        ),
        OfflineTask(
            "piqa", "piqa", (Form(("goal", "sol1", "sol2", "label")), normalised(forms.goal)), "piqa/plain_text"
        ),
        OfflineTask(
            "winogrande",
            "winogrande",
            (Form(("sentence", "option1", "option2", "answer")), normalised(forms.sentence)),
            "winogrande/winogrande_xl",
        ),
        OfflineTask(
            "sciq",
            "sciq",
            (
                Form(("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer")),
                normalised(forms.supported),
            ),
            "sciq/none",
        ),
        OfflineTask(
            "commonsense_qa",
            "commonsense_qa",
            (Form(("question", "choices", "answerKey")), normalised(forms.lettered("question", 5))),
            "tau/commonsense_qa/none",
        ),
        OfflineTask(
            "medqa_4options",
            "medqa",
            (
                Form(("sent1", "ending0", "ending1", "ending2", "ending3", "label")),
                Form(("question", "options", "answer_idx"), forms.options),
            ),
            known_as=("medqa",),
        ),
        _lambada("lambada_openai"),
        _lambada("lambada_standard"),
        OfflineTask("triviaqa", "triviaqa", (Form(("question", "answer"), forms.aliases),), known_as=("trivia_qa",)),
        OfflineTask("nq_open", "nq_open", (Form(("question", "answer"), forms.answers),)),
        _gsm8k("gsm8k"),
        _gsm8k("gsm8k_cot"),
        OfflineTask(
            "humaneval",
            "humaneval",
            (Form(("task_id", "prompt", "entry_point", "test")),),
            known_as=("openai_humaneval",),
        ),
    )
}

MMLU_WITHOUT_SUBJECTS = OfflineTask(
    "mmlu",
    MMLU_FOLDER,
    (
        Form(MMLU_COLUMNS, note="no subjects: one set, its prompts name none"),
        normalised(forms.exam, note="no subjects: one set, its prompts name none"),
    ),
)


def offline_task(name: str) -> OfflineTask | None:
    """The entry of one of lm-eval's tasks or of MMLU's group; None for a task that needs the Hub."""
    if name in TASKS:
        return TASKS[name]
    if name == "mmlu" or not name.startswith(MMLU_PREFIX):
        return None
    subject = name.removeprefix(MMLU_PREFIX)
    known_as = (f"mmlu/{subject}",)
    rows = (Form(MMLU_COLUMNS), normalised(forms.exam))
    return OfflineTask(name, MMLU_FOLDER, rows, f"hails/mmlu_no_train/{subject}", known_as)


def offline_names() -> Iterator[str]:
    """What can be asked for without a hub, for help texts and errors."""
    yield from (*TASKS, "mmlu")
