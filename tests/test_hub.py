"""The Hub (`hub_server.py` plays it): models pulled and pushed, and cards that are valid there."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import FakeHub, checked_card, hub_in_place
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_same

from dicode.checkpoint import CHECKPOINTS, resolve
from dicode.cli.app import main
from dicode.config import CheckpointError
from dicode.lm.deep_lm import DeepTokenLM
from dicode.pipeline import DiCoDe
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.video.read import read_metadata

REPOSITORY = "someone/tiny"
CHECKPOINT = ["config.json", "first_stage.safetensors", "lm.safetensors", "tokenizer.json", "tokenizer.safetensors"]
# of huggingface_hub's own request, where a file goes to LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
TASKS = {"text-to-video", "video-to-video", "image-to-video", "feature-extraction"}  # of the Hub's, those of ours


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub without repositories; the cache is empty."""
    with hub_in_place(tmp_path, monkeypatch) as fake:
        yield fake


@pytest.fixture
def published(tmp_path: Path, fake_hub: FakeHub, tiny_model: Path) -> Path:
    """The folder that the fake Hub serves as the main branch of `REPOSITORY`."""
    folder = tmp_path / "published"
    shutil.copytree(tiny_model, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("modeling.py", "pytorch_model.bin", "old/lm.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"import this")
    fake_hub.folders[REPOSITORY, "main"] = folder
    return folder


# pulling


def test_a_hub_id_gives_the_model_and_its_card_and_downloads_no_code(fake_hub, published, tiny_model):
    folder = resolve(REPOSITORY)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == sorted(
        [*CHECKPOINT, "README.md"]
    )
    assert not [path for path in fake_hub.asked if path.endswith((".py", ".bin", "old/lm.safetensors"))]
    model, expected = DiCoDe.from_pretrained(REPOSITORY), DiCoDe.from_pretrained(tiny_model)
    assert_same(model.tokenizer, expected.tokenizer)
    assert_same(model.lm, expected.lm)
    assert_same(VideoTokenizer.from_pretrained(REPOSITORY), expected.tokenizer)
    assert_same(DeepTokenLM.from_pretrained(REPOSITORY), expected.lm)


def test_a_revision_gives_its_own_weights(fake_hub, published, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(published, other)
    weights = load_file(other / "lm.safetensors")
    save_file({**weights, "embedding.place": weights["embedding.place"] + 1}, other / "lm.safetensors")
    fake_hub.folders[REPOSITORY, "v1"] = other
    main_, v1 = (DiCoDe.from_pretrained(REPOSITORY, revision=name).lm.embedding.place for name in (None, "v1"))
    torch.testing.assert_close(v1, main_ + 1)
    commit = fake_hub.commit(REPOSITORY, "v1")
    assert torch.equal(DeepTokenLM.from_pretrained(REPOSITORY, revision=commit).embedding.place, v1)


@pytest.mark.parametrize("offline", ["told to be", "server down"])
def test_what_was_downloaded_once_loads_offline(fake_hub, published, monkeypatch, offline):
    before = DiCoDe.from_pretrained(REPOSITORY)
    fake_hub.stop()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline == "told to be")
    assert_same(DiCoDe.from_pretrained(REPOSITORY).lm, before.lm)
    for name, revision in ((REPOSITORY, "v1"), ("someone/else", None)):
        with pytest.raises(CheckpointError, match=r"not in the cache .*connect once, or unset HF_HUB_OFFLINE"):
            resolve(name, revision)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("someone/else", None, r"'someone/else': no folder here and no repository at http.*/else"),
        (REPOSITORY, "v9", r"'someone/tiny' at revision 'v9': no such branch, tag or commit"),
        ("someone/gated", None, r"'someone/gated': gated; ask for access at http.*/someone/gated, then run `hf auth"),
        ("someone/empty", None, r"'someone/empty': no config.json .* this is no dicode checkpoint"),
        ("some--one/tiny", None, r"'some--one/tiny': download failed.*HFValidationError"),
        ("./nowhere", None, r"no checkpoint at './nowhere': expected a folder"),
        ("sprites", "v1", r"revision 'v1': .*sprites is a folder, which has none"),
        ("published", "v1", r"revision 'v1': published is a folder, which has none"),
        ("published/old", None, r"no checkpoint at 'published/old': expected a folder with config.json, one of"),
        (Path(REPOSITORY), None, r"no checkpoint at 'someone.tiny': expected a folder"),
    ],
)
def test_what_cannot_be_found_is_one_clear_error(fake_hub, published, tmp_path, monkeypatch, name, revision, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing here")
    fake_hub.folders["someone/empty", "main"] = tmp_path / "empty"
    fake_hub.gated.add("someone/gated")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        DiCoDe.from_pretrained(name, revision=revision)
    if name == Path(REPOSITORY) or not str(name).startswith("some"):
        assert fake_hub.asked == []


def test_a_truncated_upload_is_refused_when_it_loads(fake_hub, published):
    weights = published / "tokenizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"tokenizer.safetensors: not a readable safetensors file"):
        DiCoDe.from_pretrained(REPOSITORY)


def test_commands_take_a_hub_id_and_a_revision_and_note_the_commit(fake_hub, published, tmp_path, capsys):
    fake_hub.folders[REPOSITORY, "v1"] = published
    model = ["--model", REPOSITORY, "--revision", "v1"]
    argv = ["generate", "a red square", "--seconds", "0.5", "--scale", "1", "-o", f"{tmp_path}/a/", *model]
    assert main(argv) == 0, capsys.readouterr().err
    assert read_metadata(tmp_path / "a")["model"] == f"{REPOSITORY}@{fake_hub.commit(REPOSITORY, 'v1')}"
    tokens = str(tmp_path / "tokens.safetensors")
    assert main(["tokenize", f"{tmp_path}/a", "-o", tokens, *model]) == 0, capsys.readouterr().err
    assert main(["reconstruct", tokens, "-o", f"{tmp_path}/b/", *model]) == 0, capsys.readouterr().err
    assert main(["info", REPOSITORY, "--revision", "v1"]) == 0
    assert "licence: mit" in capsys.readouterr().out
    assert main(["info", REPOSITORY, "--revision", "v9"]) == 2
    assert "no such branch, tag or commit" in capsys.readouterr().err


# pushing


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def cardless(folder: Path) -> DiCoDe:
    model = DiCoDe.from_pretrained(folder)
    model.card = None
    return model


def test_push_sends_the_checkpoint_and_a_card_and_nothing_else(fake_hub, tiny_model, tmp_path):
    model = cardless(tiny_model)
    url = model.push_to_hub("tiny", private=True, token="hf_secret", commit_message="Second try")
    assert url == f"{fake_hub.url}/me/tiny" and fake_hub.private["me/tiny"]
    assert [commit["summary"] for commit in fake_hub.commits] == ["Second try"]
    sent = files_of(fake_hub.folders["me/tiny", "main"])
    card = sent.pop("README.md").decode()
    assert (
        card.startswith("---\nlibrary_name: dicode\npipeline_tag: text-to-video\n---\n") and "--model me/tiny" in card
    )
    model.save_pretrained(tmp_path / "saved")
    assert sent == files_of(tmp_path / "saved") and sorted(sent) == sorted(CHECKPOINT)


def test_push_keeps_the_card_that_is_there_unless_given_one(fake_hub, published, tiny_model):
    model = DiCoDe.from_pretrained(tiny_model)
    model.card = "# Of the model"
    model.push_to_hub(REPOSITORY, revision="v2", dtype=torch.float16)
    sent = files_of(fake_hub.folders[REPOSITORY, "v2"])
    assert sent["README.md"] == b"---\nlicense: mit\n---\n"
    model.save_pretrained(published.parent / "half", torch.float16)
    assert sent.items() >= files_of(published.parent / "half").items()
    model.push_to_hub(REPOSITORY, card="---\nlicense: mit\n---\n# Mine")
    assert (fake_hub.folders[REPOSITORY, "main"] / "README.md").read_text().endswith("# Mine")


def test_push_refuses_to_put_a_private_model_into_a_public_repository(fake_hub, published, tiny_model):
    with pytest.raises(ValueError, match=r"someone/tiny exists and is public: make it private at http"):
        DiCoDe.from_pretrained(tiny_model).push_to_hub(REPOSITORY, private=True)
    assert fake_hub.commits == []


def test_push_refuses_a_card_whose_metadata_the_hub_refuses(fake_hub, tiny_model):
    card = "---\nmodel-index:\n- name: tiny\n  results:\n  - task: {type: text-to-video}\n---\n"
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md(.|\n)*model_index"):
        DiCoDe.from_pretrained(tiny_model).push_to_hub("tiny", card=card)
    assert fake_hub.commits == []


def test_a_bundled_model_pushed_and_pulled_is_the_same_bit_for_bit(fake_hub):
    model = DiCoDe.from_pretrained("blocks")
    model.push_to_hub("someone/mine")
    again = DiCoDe.from_pretrained("someone/mine")
    assert_same(again.tokenizer, model.tokenizer)
    assert_same(again.lm, model.lm)
    assert again.card is not None and "](../" not in again.card
    assert huggingface_hub.ModelCard(again.card).data.to_dict() == metadata("blocks")


# cards


def metadata(name: str) -> dict[str, Any]:
    return huggingface_hub.ModelCard.load(CHECKPOINTS / name / "README.md").data.to_dict()


@pytest.mark.parametrize("name", [path.name for path in sorted(CHECKPOINTS.iterdir())])
def test_cards_of_bundled_models_are_valid_for_the_hub(name: str) -> None:
    """What the library knows of the Hub's rules; and that the figures are those of results/."""
    text = (CHECKPOINTS / name / "README.md").read_text(encoding="utf-8")
    status, _, answer = checked_card(text)
    assert (status, json.loads(answer)) == (200, {"errors": [], "warnings": []})
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.library_name, data.model_name) == ("apache-2.0", "dicode", name)
    assert data.pipeline_tag in TASKS and data.eval_results
    for result in data.eval_results:
        assert result.task_type in TASKS and result.metric_name and isinstance(result.metric_value, int | float)
    assert "## Data" in text and "## Limits" in text


def test_the_figures_of_cards_are_those_of_results() -> None:
    subprocess.run([sys.executable, "tools/cards.py", "--check"], cwd=CHECKPOINTS.parents[1], check=True)
