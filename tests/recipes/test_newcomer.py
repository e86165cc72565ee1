"""A Qwen2 folder that transformers wrote, a Parquet file, and the four commands of the README."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxreward import cli, testing

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(require, tmp_path_factory):
    """A random tiny Qwen2 with the byte tokenizer, saved by transformers."""
    require("torch")
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    out = testing.write_tokenizer(tmp_path_factory.mktemp("newcomer") / "qwen")
    config = Qwen2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Pairs with the fields and types of UltraFeedback-binarized."""
    say = lambda role, content: {"role": role, "content": content}
    rows = []
    for i, record in enumerate(testing.synthetic_pairs(24, seed=3)):
        ask = say("user", record["prompt"])
        rows.append(
            {
                "prompt": record["prompt"],
                "prompt_id": f"{i:08x}",
                "chosen": [ask, say("assistant", record["chosen"])],
                "rejected": [ask, say("assistant", record["rejected"])],
                "messages": [ask, say("assistant", record["chosen"])],
                "score_chosen": 8.0,
                "score_rejected": 3.5,
            }
        )
    path = tmp_path_factory.mktemp("newcomer_data") / "train_prefs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.slow
def test_verify_train_evaluate_export(folder, parquet, tmp_path, capsys):
    """Catches any step between a stranger's model and data and a reward model that is theirs."""
    run = str(tmp_path / "run")

    def ok(*words):
        code = cli.main([str(word) for word in words])
        got = capsys.readouterr()
        assert code == 0, got.err
        return got.out

    assert ok("verify", folder).rstrip().endswith("the same model")
    ok(
        "train",
        "--config=reward_model/bradley_terry:smoke",
        f"--workdir={run}",
        f"--config.models.policy.init=hf:{folder}",
        f"--config.data.path={parquet}",
        "--config.data.eval_fraction=0.2",
    )
    result = json.loads(ok("evaluate", "--model", run, "--data", parquet))
    assert result["protocol"]["read"] == 24
    ok("export", "--model", run, "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    shown = ok("verify", tmp_path / "out", "--pairs", parquet, "--limit", "5")
    assert "qwen2, reward model" in shown and "pairs flipped" in shown
    ok("score", "--model", tmp_path / "out", "--input", parquet, "--output", tmp_path / "s.jsonl")
    scored = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert len(scored) == 24 and np.isfinite([r["chosen_score"] for r in scored]).all()
