"""What the tasks ask stays as it is, byte for byte.

The shipped heads were trained on the synthetic samples, and the committed answers are to the
questions of RULER and L-Eval. A hash that differs means other samples: put the code right, or, for
a task of an evaluation, raise its `version` and ask again.

The language reference of CPython differs between Python versions; its cleaning is tested on blocks
of our own.
"""

import hashlib
import json

import pytest

from locret.evaluation.questions import Renderer
from locret.tasks import GROUPS, TASKS, TaskSettings, synthetic
from locret.tasks.haystack import load_haystack
from tests.evaluation.eval_data import DATA, NOUNS, TRAITS, write_data

LENGTHS = (900, 1500, 3000)
SEEDS = (0, 1, 7)
DEPTHS = (None, 0.0, 0.3, 1.0)

HASHES = {
    "passkey": "e283d47b25515425",
    "niah_single": "b288d1666d96887a",
    "niah_multikey": "a578c564dc0b711d",
    "niah_multivalue": "60403c389447d1d2",
    "niah_multiquery": "11b38d8c53bd01e5",
    "variable_tracking": "d7cdf76545cee261",
    "next_sentence": "6cd7e3e21e94a6b2",
    "language reference": "2b3d78f96c7a1330",
    "ruler_niah_single_1": "1c5c3917ca53d914",
    "ruler_niah_single_2": "c0e8929378988a0a",
    "ruler_niah_single_3": "e6424bf2f7621d5b",
    "ruler_niah_multikey_1": "d639fd6f0a11746b",
    "ruler_niah_multikey_2": "8ef5b0a9e7aa8d37",
    "ruler_niah_multikey_3": "57fa10d52e45ddd2",
    "ruler_niah_multivalue": "e296b23d8796bccc",
    "ruler_niah_multiquery": "116254e7acee7575",
    "ruler_vt": "fbe9b1dbe9c61e30",
    "ruler_cwe": "68cd01b621a09d27",
    "ruler_fwe": "f65c7271966cc155",
    "ruler_qa_1": "028206f4c050221f",
    "ruler_qa_2": "b0a8b893239ce15e",
    "leval_codeU": "0a31d18d30c764a2",
    "leval_coursera": "395a2310a9c3dc71",
    "leval_gsm100": "acca4c406a38ca1f",
    "leval_quality": "fcd9db42694b6860",
    "leval_sci_fi": "010fcdc94e071cf2",
    "leval_topic_retrieval_longchat": "05894cf2512f23a8",
    "leval_tpo": "fcd9db42694b6860",
    "leval_financial_qa": "ce5c6720f2d64632",
    "leval_legal_contract_qa": "ce5c6720f2d64632",
    "leval_multidoc_qa": "ce5c6720f2d64632",
    "leval_narrative_qa": "ce5c6720f2d64632",
    "leval_natural_question": "ce5c6720f2d64632",
    "leval_scientific_qa": "ce5c6720f2d64632",
    "leval_gov_report_summ": "ce5c6720f2d64632",
    "leval_meeting_summ": "ce5c6720f2d64632",
    "leval_news_summ": "ce5c6720f2d64632",
    "leval_paper_assistant": "ce5c6720f2d64632",
    "leval_patent_summ": "ce5c6720f2d64632",
    "leval_review_summ": "ce5c6720f2d64632",
    "leval_tv_show_summ": "ce5c6720f2d64632",
    "fairytaleqa": "c9b81a0a744a708f",
    "qmsum": "c2dfd952be72b9b3",
}


def sha(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def prose():
    """Sentences in paragraphs, with what ends no sentence, and some too short or too long."""
    walks = [
        f"The {trait} {noun} walked home, i.e. to town no. {i}.\n"
        f'"Is it far?" asked J. {noun.title()}.'
        for i, (trait, noun) in enumerate(
            (trait, noun) for trait in TRAITS for noun in NOUNS if trait[0] < noun[0]
        )
    ]
    return "\n\n".join([*walks, "Too short.", f"It went {'on and ' * 40}on.", walks[0]])


RESTS = [f"The {trait} {noun} rests e.g. here:\nand there." for trait in TRAITS for noun in NOUNS]
TOPICS = {
    "walks": "Walks\n*****\n\nThe *first* block, see [1], is of a walk that is told in words.\n\n"
    '* A "quoted" item of **some** length ends here.  Then a `second` one comes “as it” was.\n\n'
    "   grammar ::= not_prose and so on and on and on\n\n[1] A footnote that is not to be read.\n\n"
    + "\n\n".join(RESTS),
    "code": ">>> print(1)\n\nThis one sentence is long enough, and made of letters.\n\n1 | 2 | 3",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"))
    (folder / "text.txt").write_text(prose(), encoding="utf-8")
    return folder


def everything(sample):
    """Every field of a synthetic sample, and what is made of them."""
    fields = [sample.task, sample.context, sample.question, sample.answer, sample.expected]
    return [*fields, sample.depth, sample.answer_prefix, synthetic.prompt_text(sample)]


def made(task, tokenizer, haystack):
    return [
        everything(synthetic.make_sample(task, length, tokenizer, seed, depth, haystack))
        for length in LENGTHS
        for seed in SEEDS
        for depth in DEPTHS
    ]


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_synthetic_samples_stay(task, tokenizer, folder):
    haystacks = ("noise", folder / "text.txt")
    found = sha([made(task, tokenizer, haystack) for haystack in haystacks])
    assert found == HASHES[task]


def test_the_language_reference_is_cleaned_as_it_was(monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", TOPICS)
    found = load_haystack.__wrapped__(None)
    assert len(found) > 10
    assert sha(found) == HASHES["language reference"]


@pytest.mark.parametrize("name", GROUPS["ruler"])
def test_ruler_samples_stay(name, tokenizer, folder):
    renderer = Renderer(tokenizer, chat=True)
    found = []
    for length in (3000, 16000):
        settings = TaskSettings(data_dir=folder, data=DATA, length=length)
        samples = TASKS[name](settings).samples(3, renderer)
        found += [fields(sample) for sample in samples]
    assert sha(found) == HASHES[name]


def fields(sample):
    """What is asked and expected, whatever a sample holds beside it."""
    asked = [sample.id, sample.context, sample.question, sample.answers]
    return [*asked, sample.answer_prefix, sample.group]


@pytest.mark.parametrize("name", GROUPS["leval"])
def test_leval_prompts_stay(name, tmp_path):
    told = "What is {}, based on the world described in the document?"
    answers = ["True [fact: False]", "False [fact: True]"] if "sci_fi" in name else ["A", "B C"]
    rows = [
        {"input": f"A tale of {noun}s. ", "outputs": answers}
        | {"instructions": [told.format(noun), f" When was the {noun} seen? "]}
        for noun in NOUNS[:2]
    ]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASKS[name](TaskSettings(data_dir=tmp_path))
    samples = task.samples(None, None)
    assert len(samples) == (8 if "sci_fi" in name else 4)
    assert sha([fields(sample) for sample in samples]) == HASHES[name]


@pytest.mark.parametrize("name", ["fairytaleqa", "qmsum"])
def test_prompts_about_documents_stay(name, folder):
    data = {name: DATA["fairytaleqa"]}
    samples = TASKS[name](TaskSettings(data_dir=folder, data=data)).samples(None, None)
    assert sha([fields(sample) for sample in samples]) == HASHES[name]
