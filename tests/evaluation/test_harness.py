"""The harness model: the scores of `hf` without a limit, a bounded cache with one."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from locret import cli  # noqa: E402
from locret.cli import PLUGIN, with_our_tasks  # noqa: E402
from locret.engine.engine import Engine  # noqa: E402
from locret.evaluation.ask import Asker, Engines  # noqa: E402
from locret.integrations import lm_eval as harness  # noqa: E402
from locret.integrations.lm_eval import LocretLM  # noqa: E402
from locret.integrations.lm_eval_tasks import harness_name, write_task_files  # noqa: E402
from locret.model.hooks import as_argument  # noqa: E402
from locret.model.loading import load_model  # noqa: E402
from locret.tasks import TASKS  # noqa: E402
from tests.evaluation.eval_data import DATA, NOUNS, TRAITS, write_artifacts, write_data  # noqa: E402
from tests.forked import Forked  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
GREEDY = {"do_sample": False, "max_gen_toks": 5}


def write_tasks(folder, count):
    """Two generation tasks, one of choices and one of whole texts, over rows of our own."""
    rows = [
        {
            "context": f"The {TRAITS[i % 10]} {NOUNS[i % 7]} lives in house {i}. " * (1 + i % 3),
            "question": f"Where does the {NOUNS[i % 7]} live?",
            "answer": f"in house {i}",
            "choices": [f"in house {i}", "nowhere", f"in house {i + 1} or near the sea"],
        }
        for i in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "rows.jsonl")},
        "test_split": "train",
        "doc_to_text": "{{context}}\n\n{{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
    }
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    tasks = {
        "local_short": {
            "output_type": "generate_until",
            "generation_kwargs": GREEDY | {"until": ["\n", "."]},
            "metric_list": exact,
        },
        "local_shots": {
            "output_type": "generate_until",
            "num_fewshot": 2,
            "fewshot_split": "train",
            "generation_kwargs": GREEDY | {"until": []},
            "metric_list": [{"metric": "bleu"}],
        },
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{context}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, own in tasks.items():
        text = yaml.safe_dump(common | own | {"task": name})
        (folder / f"{name}.yaml").write_text(text)
    return list(tasks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    write_data(folder / "data")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks", 6)
    return write_artifacts(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    loaded = load_model(str(folder / "backbone"), device="cpu", dtype="float32")
    # As real models: a row that ended is filled up while the others of its batch go on.
    loaded.model.generation_config.eos_token_id = loaded.tokenizer.eos_token_id
    return loaded


def evaluated(model, folder, tasks, **settings):
    """Scores by task, and every response."""
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **settings
    )
    responses = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for task, samples in results["samples"].items()
    }
    return results["results"], responses, results


def assert_same(ours, stock):
    assert set(ours[0]) == set(stock[0])
    for task, scores in stock[0].items():
        for name, score in scores.items():
            if isinstance(score, float) and "perplexity" in name:
                assert ours[0][task][name] == pytest.approx(score, rel=1e-4)
            else:
                assert ours[0][task][name] == score, (task, name)
        if ours[1][task] != stock[1][task]:
            assert "choice" in task or "text" in task
            mine, theirs = (
                torch.tensor(numbers(responses[1][task])) for responses in (ours, stock)
            )
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def numbers(nested):
    if isinstance(nested, (list, tuple)):
        return [number for part in nested for number in numbers(part)]
    return [float(nested)]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("chat", [False, True])
def test_without_a_limit_the_scores_are_those_of_hf(batch_size, chat, folder, loaded):
    tasks = ["local_short", "local_shots", "local_choice", "local_text"]
    stock = HFLM(copy.deepcopy(loaded.model), tokenizer=loaded.tokenizer, batch_size=batch_size)
    ours = LocretLM(loaded, batch_size=batch_size, chunk_size=None)
    settings = {"apply_chat_template": chat}
    found = evaluated(ours, folder, tasks, **settings)
    assert_same(found, evaluated(stock, folder, tasks, **settings))
    assert found[2]["config"]["locret"]["held"]["prompts"] > 0  # it went through the engine


def test_padding_is_in_the_embedding(loaded, folder):
    """Some tokenizers have a token for it that their model has not."""
    larger = copy.deepcopy(loaded.tokenizer)
    larger.add_special_tokens({"pad_token": "<|beyond|>"})
    prompts = [PROMPT, PROMPT.replace("house 12", "house 21")]
    asked = requests("generate_until", prompts)
    whole = bounded(loaded, folder, batch_size=2).generate_until(asked)
    model = copy.deepcopy(loaded.model)  # that ends one answer before the other
    model.generation_config.eos_token_id = larger(whole[1]).input_ids[1]
    here, beyond = (replace(loaded, model=model, tokenizer=t) for t in (loaded.tokenizer, larger))
    found = bounded(beyond, folder, batch_size=2).generate_until(asked)
    assert found == bounded(here, folder, batch_size=2).generate_until(asked) != whole
    ends = Asker(beyond, Engines(beyond, {}, None, {}))._ends()
    assert ends["pad_token_id"] == larger.eos_token_id != larger.pad_token_id


@pytest.mark.slow
def test_smollm2_scores_as_hf_does(tmp_path):
    (tmp_path / "tasks").mkdir()
    tasks = write_tasks(tmp_path / "tasks", 8)[:3]
    loaded = load_model("embedded:smollm2", device="cpu", dtype="float32")
    stock = evaluated(HFLM(loaded.model, tokenizer=loaded.tokenizer), tmp_path, tasks)
    ours = evaluated(LocretLM(loaded), tmp_path, tasks)
    assert_same(ours, stock)
    assert stock[0]["local_choice"]["acc,none"] > 0.3
    assert all(stock[0][task]["sample_len"] == 8 for task in tasks)


def requests(kind, prompts, document=None, **kwargs):
    settings = GREEDY | {"until": []}
    return [
        Instance(
            kind,
            document or {},
            (prompt, kwargs.get("continuation", settings)),
            i,
            metadata=("task", i, 1),
        )
        for i, prompt in enumerate(prompts)
    ]


CONTEXT = "The quiet otter lives in house 12. " * 20
PROMPT = f"Read this.\n{CONTEXT}\nWhere does it live?\nAnswer:"


def bounded(loaded, folder, **settings):
    given = {"heads": str(folder / "heads"), "budget": 40, "chunk_size": 32} | settings
    return LocretLM(loaded, **given)


@pytest.fixture
def read(monkeypatch):
    """What engines compress."""
    read = []
    real = Engine.prefill

    def prefill(self, input_ids, *args, **kwargs):
        read.append((input_ids, kwargs.get("query_ids")))
        return real(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Engine, "prefill", prefill)
    return read


def test_a_prompt_is_compressed_up_to_its_question(loaded, folder, read):
    text = loaded.tokenizer.decode
    model = bounded(loaded, folder, protocol="query_agnostic")
    asked = requests("generate_until", [PROMPT], {"context": CONTEXT})
    model.generate_until(asked, disable_tqdm=True)
    assert text(read[-1][0][0]) == f"Read this.\n{CONTEXT.strip()}"
    by_marker = bounded(loaded, folder, protocol="query_agnostic", question_marker="\nWhere")
    by_marker.generate_until(requests("generate_until", [PROMPT]), disable_tqdm=True)
    assert text(read[-1][0][0]) == f"Read this.\n{CONTEXT}"
    assert all(query is None for _, query in read)
    aware = bounded(loaded, folder, local_tokens=3)
    aware.generate_until(requests("generate_until", [PROMPT]), disable_tqdm=True)
    ids = loaded.tokenizer(PROMPT)["input_ids"]
    assert read[-1][0][0].tolist() == ids[:-3] and read[-1][1][0].tolist() == ids[-3:]
    aware.generate_until(asked, disable_tqdm=True)  # here the document tells the context
    assert text(read[-1][0][0]) == f"Read this.\n{CONTEXT.strip()}"
    aware._sizes.pop()
    for one in (model, by_marker, aware):
        held = one.get_model_info()["locret"]["held"]
        assert held["units_max"] == 40 and held["prompts"] == 1
    with pytest.raises(ValueError, match="task task: the context cannot be told from the question"):
        model.generate_until(requests("generate_until", [PROMPT]), disable_tqdm=True)


@pytest.mark.parametrize("end", ["", " ", "\n\n"])
def test_white_space_behind_a_question_does_not_hide_its_context(end, loaded, folder, read):
    model = bounded(loaded, folder, protocol="query_agnostic")
    asked = Instance(
        request_type="loglikelihood",
        doc={"context": CONTEXT},
        arguments=(PROMPT + end, " house 12"),
        idx=0,
    )
    model.loglikelihood([asked], disable_tqdm=True)
    assert loaded.tokenizer.decode(read[-1][0][0]) == f"Read this.\n{CONTEXT.strip()}"


def test_query_aware_heads_get_the_question_in_front(loaded, folder, read):
    model = bounded(loaded, folder, heads=str(folder / "aware"))
    asked = requests("generate_until", [PROMPT], {"context": CONTEXT})
    model.generate_until(asked, disable_tqdm=True)
    context, query = read[-1]
    assert loaded.tokenizer.decode(context[0]).endswith(CONTEXT.strip())
    assert loaded.tokenizer.decode(query[0]) == " \nWhere does it live?\nAnswer:"
    with pytest.raises(ValueError, match="are query-aware; use protocol=query_aware"):
        bounded(loaded, folder, heads=str(folder / "aware"), protocol="query_agnostic")


def test_rows_of_a_batch_are_answered_as_alone(loaded, folder):
    prompts = [PROMPT, PROMPT + " It", CONTEXT[:300], "Short."]
    alone, together = (bounded(loaded, folder, budget="4x", batch_size=n) for n in (1, 4))
    asked = requests("generate_until", prompts)
    answers = alone.generate_until(asked, disable_tqdm=True)
    assert together.generate_until(asked, disable_tqdm=True) == answers
    assert together.generate_until(asked[::-1], disable_tqdm=True) == answers[::-1]


def test_continuations_share_their_context_and_are_scored_as_token_by_token(loaded, folder, read):
    model = bounded(loaded, folder)
    texts = [" house 12", " sea", " house 12 and more"]
    asked = [
        Instance("loglikelihood", {}, (PROMPT, text), i, metadata=("task", i, 1))
        for i, text in enumerate(texts)
    ]
    scores = model.loglikelihood(asked, disable_tqdm=True)
    assert len(read) == 1
    for text, (score, greedy) in zip(texts, scores, strict=True):
        expected, best = token_by_token(model, PROMPT, text)
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == best
    unlimited = LocretLM(loaded).loglikelihood(asked, disable_tqdm=True)
    assert [score for score, _ in unlimited] != pytest.approx([score for score, _ in scores])


def token_by_token(model, context, continuation):
    """The plain way: one token after the other over the compressed cache."""
    ids, wanted = model._encode_pair(context, continuation)
    engine = model._engines.get(model.setup, 40)
    rest = harness.LOCAL_TOKENS
    total, best = 0.0, True
    with engine, torch.no_grad():
        cache = engine.prefill(torch.tensor([ids[:-rest]]), query_ids=torch.tensor([ids[-rest:]]))
        logits = model.model(torch.tensor([ids[-rest:]]), **as_argument(model.model, cache)).logits
        for token in wanted:
            logs = logits[0, -1].log_softmax(-1)
            total += float(logs[token])
            best = best and int(logs.argmax()) == token
            logits = model.model(torch.tensor([[token]]), **as_argument(model.model, cache)).logits
    return total, best


def test_a_text_is_scored_in_a_bounded_cache(loaded, folder):
    asked = [Instance("loglikelihood_rolling", {}, (CONTEXT * 2,), 0, metadata=("task", 0, 1))]
    model = bounded(loaded, folder)
    (score,) = model.loglikelihood_rolling(asked, disable_tqdm=True)
    assert model.get_model_info()["locret"]["held"]["units_max"] == 40
    (whole,) = LocretLM(loaded).loglikelihood_rolling(asked, disable_tqdm=True)
    assert math.isfinite(score) and score != pytest.approx(whole, rel=1e-3)
    ample = bounded(loaded, folder, budget=5000)
    (same,) = ample.loglikelihood_rolling(asked, disable_tqdm=True)
    assert same == pytest.approx(whole, rel=1e-4)


def test_a_budget_may_be_memory(loaded, folder):
    model = bounded(loaded, folder, budget="20kB")
    model.generate_until(requests("generate_until", [PROMPT]), disable_tqdm=True)
    assert 10_000 < model.get_model_info()["locret"]["held"]["bytes_max"] <= 20_000


def test_prompts_that_were_cut_are_counted(loaded, folder):
    model = bounded(loaded, folder, max_length=100)
    model.generate_until(requests("generate_until", [PROMPT, "Short."]), disable_tqdm=True)
    assert model.get_model_info()["locret"]["prompts_cut"] == 1
    asked = [Instance("loglikelihood", {}, (PROMPT, " sea"), 0, metadata=("task", 0, 1))]
    model.loglikelihood(asked, disable_tqdm=True)
    assert model.get_model_info()["locret"]["prompts_cut"] == 2


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"heads": "no/such/heads"}, "no/such/heads"),
        ({"heads": None, "policy": "locret"}, "policy locret needs trained heads"),
        ({"adapter": "no/such/adapter"}, "no/such/adapter"),
        ({"policy": "nosuch"}, "policy 'nosuch' is unknown"),
        ({"budget": "8"}, "budget of locret is '8'"),
        ({"heads": None}, "budget is 40, but nothing scores units"),
        ({"protocol": "blind"}, "protocol 'blind' is unknown"),
        ({"bogus": "8x", "sinks": 4}, "bogus, sinks: unknown arguments; .* budget, .*truncation"),
        ({"heads": ""}, "heads is an empty path"),
        ({"peft": "some/adapter"}, "peft: unknown arguments; expected some of .*, adapter"),
    ],
)
def test_a_mistake_shows_before_a_model_is_loaded(settings, complaint, folder, monkeypatch):
    monkeypatch.setattr(harness, "load_model", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=complaint):
        LocretLM("backbone", **{"heads": str(folder / "heads"), "budget": 40} | settings)


def test_what_the_harness_passes_by_itself_is_taken(folder):
    given = f"pretrained={folder / 'backbone'},budget=8x,policy=random,dtype=float32"
    given += ",trust_remote_code=True,add_bos_token=True,softmax_dtype=float32,truncation=False"
    of_command = {"batch_size": 3, "max_batch_size": 8, "device": "cpu"}
    model = LocretLM.create_from_arg_string(given, of_command)
    assert model.batch_size == 3 and model.max_batch_size == 8 and model.add_bos_token
    assert model.device.type == "cpu" and model.softmax_dtype == torch.float32


def test_weights_are_stored_in_few_bits(folder):
    pytest.importorskip("torchao", reason="package torchao is not installed")
    given = f"pretrained={folder / 'backbone'},budget=8x,policy=random,weights=int8"
    model = LocretLM.create_from_arg_string(given, {"batch_size": 1, "device": "cpu"})
    assert model.get_model_info()["locret"]["weights"] == "int8"
    with pytest.raises(ValueError, match="int3"):
        LocretLM.create_from_arg_string(given.replace("int8", "int3"), {"device": "cpu"})


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    return str(write_task_files(tmp_path_factory.mktemp("harness") / "tasks"))


def test_our_task_files_are_known_to_the_harness(task_files):
    manager = TaskManager(include_path=task_files, include_defaults=False)
    assert {harness_name(name) for name in TASKS} | {"offline_ruler"} <= set(manager.all_tasks)


def test_our_tasks_are_where_the_harness_looks(tmp_path):
    there = str(tmp_path / "tasks")
    assert with_our_tasks(["run"], there) == ["run", "--include_path", there]
    assert (tmp_path / "tasks" / "offline_ruler_vt.yaml").is_file()
    assert with_our_tasks(["--include_path=x"], there) == ["--include_path=x"]
    assert with_our_tasks([], there) == []


def metadata(folder, **more):
    data = {"data_dir": str(folder / "data"), "data": DATA, "length": 2500, "samples": 2}
    return data | {"pretrained": str(folder / "backbone"), "cache_dir": str(folder)} | more


def test_our_tasks_run_in_the_harness(loaded, folder, task_files):
    manager = TaskManager(
        include_path=task_files, include_defaults=False, metadata=metadata(folder)
    )
    results = lm_eval.simple_evaluate(
        model=bounded(loaded, folder, budget="8x", protocol="query_agnostic"),
        tasks=["offline_ruler_niah_single_1", "offline_ruler_qa_1", "offline_fairytaleqa"],
        task_manager=manager,
        apply_chat_template=True,
        limit=2,
        bootstrap_iters=0,
    )
    assert results["results"]["offline_ruler_qa_1"]["string_match,none"] >= 0
    assert results["results"]["offline_fairytaleqa"]["rouge_l,none"] >= 0
    assert results["config"]["locret"]["held"]["prompts"] == 6
    (prompt, _) = results["samples"]["offline_ruler_niah_single_1"][0]["arguments"][0]
    assert prompt.startswith("<|user|>A special magic number")
    assert prompt.endswith("mentioned in the provided text is")


def test_missing_data_says_how_to_give_it(folder, task_files):
    nothing = metadata(folder, data_dir=None, data=None)
    manager = TaskManager(include_path=task_files, include_defaults=False, metadata=nothing)
    with pytest.raises(ValueError, match=r"squad_dev.* --metadata '\{\"data_dir\": \"FOLDER\""):
        manager.load(["offline_ruler_qa_1"])


@pytest.mark.slow
def test_several_ranks_and_the_harnesss_own_command_give_the_same_scores(folder, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", "29617", "-m", "locret"]

    def arguments(output):
        args = f"lm_eval --include_path {folder / 'tasks'} --model locret --device cpu"
        args += f" --tasks local_short,local_choice --output_path {output} --log_samples"
        model = f"pretrained={folder / 'backbone'},heads={folder / 'heads'},budget=30,dtype=float32"
        return [*args.split(), "--model_args", model]

    def scores(output):
        (result,) = output.rglob("results*.json")
        return json.loads(result.read_text())

    log = tmp_path / "alone.txt"
    assert Forked(arguments(tmp_path / "alone"), log).wait() == 0, log.read_text()
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, *arguments(tmp_path / "ranks")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, spread = scores(tmp_path / "alone"), scores(tmp_path / "ranks")
    assert spread["results"] == ours["results"]
    assert ours["config"]["locret"]["held"]["units_max"] == 30


def test_the_plugin_registers_the_model(capsys):
    assert cli.main(["lm_eval", "--plugin"]) == 0
    assert capsys.readouterr().out.strip() == str(PLUGIN)
    code = (
        "from lm_eval.tasks._yaml_loader import load_yaml\n"
        "from lm_eval.api.registry import get_model\n"
        f"load_yaml({str(PLUGIN)!r})\n"
        "print(get_model('locret').__name__, get_model('hf').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["LocretLM", "HFLM"], done.stderr
