"""The pages of docs/ against the code: keys, defaults, commands, names, rows and files."""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

import jaxreward
from jaxreward import cli, overrides, presets
from jaxreward.core.resolve import resolve
from jaxreward.data import conversations, points, sources

REPO = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md"))]
SHORT = ("configs", "add_a_model", "add_a_paper", "from_trl", "data")
SECTIONS = (
    "models|data|losses|optim|mesh|train|evals|rollouts|rewards|advantages|stages|"
    "intra|search|noise"
)

every_page = pytest.mark.parametrize("name", PAGES)


def read(name):
    return (REPO / name).read_text(encoding="utf-8")


def table(name, first):
    """The cells of the rows of the table of a page whose first heading is `first`."""
    found = re.search(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", read(name), re.M)[1]
    cells = lambda line: [x.strip() for x in re.split(r"(?<!\\)\|", line)[1:-1]]
    return [[x.replace("\\|", "|") for x in cells(line)] for line in found.splitlines()]


def bare(cell):
    return cell.strip("`")


def keys(name):
    """{key: value} of a shipped config, all leaves."""
    return {key: value for key, (_, value) in presets.diff({}, presets.load(name)).items()}


def any_name(key):
    """`losses.bt.fn` and `evals.gaps.fn` as the names of losses and evaluators are: free."""
    key = re.sub(r"^(losses|evals|models|rewards|stages)\.[\w*]+", r"\1.*", key)
    return re.sub(r"(\.weights)\.\w+", r"\1", key)


@pytest.mark.parametrize(
    ("name", "column"), [("reward_model/bradley_terry", 1), ("sft/chat", 2)], ids=["rm", "sft"]
)
def test_every_key_stands_in_the_table_with_its_default(name, column):
    """Catches a key that was added, renamed or given another default, and a page that was not."""
    shown = {}
    for row in table("docs/configs.md", "key"):
        said = bare(row[1] if row[column] == "same" else row[column])
        if said != "-":
            shown[bare(row[0])] = "" if said == "(empty)" else said
        assert row[3], f"{row[0]} is not explained"
    assert shown == {key: overrides.spell(value) for key, value in keys(name).items()}


def test_keys_of_the_other_shipped_configs_are_explained_too():
    """Catches a config with a key of its own that no page names."""
    page = "".join(read(f"docs/{name}.md") for name in ("configs", "online_rl", "diffusion"))
    named = {any_name(key) for key in re.findall(rf"`((?:{SECTIONS})\.[\w.*]+)", page)}
    named |= {f"losses.*.{word}" for row in table("docs/configs.md", "fn") for word in words(row)}
    for name in presets.shipped():
        unknown = {any_name(key) for key in keys(name)} - named - {"seed", "recipe"}
        assert {key for key in unknown if not key.startswith("evals.")} == set(), name


@pytest.mark.parametrize(
    "section, make, page, first",
    [
        ("rollouts", presets.rollouts, "online_rl", "key"),
        ("rollouts", presets.denoised, "diffusion", "setting"),
    ],
)
def test_the_table_of_rollouts_is_complete(section, make, page, first):
    """Catches a setting of online RL that the page lacks, or has with another default."""
    shown = {bare(row[0]): bare(row[1]) for row in table(f"docs/{page}.md", first)}
    given = inspect.signature(make).parameters.values()
    must = "must be given"
    said = {
        f"{section}.{p.name}": must
        if p.default is p.empty
        else overrides.spell(p.default) or "(empty)"
        for p in given
    }
    assert shown == said


@pytest.mark.parametrize("section", ["noise", "intra", "search"])
def test_the_tables_of_small_sections_are_complete(section):
    """Catches a setting of a denoiser that the page lacks, or has with another default."""
    page = read("docs/diffusion.md")
    found = re.findall(rf"^\| `({section}\.\w+)` \| `(.*?)` \|", page, re.M)
    given = inspect.signature(getattr(presets, section)).parameters.values()
    assert dict(found) == {f"{section}.{p.name}": overrides.spell(p.default) for p in given}


def words(row):
    """Keywords that a row of the table of losses names."""
    return re.findall(r"`(\w+)`", row[2])


def test_the_table_of_losses_is_complete():
    """Catches a loss or a keyword that is not in the table, or is no more."""
    rows = table("docs/configs.md", "fn")
    for row in rows:
        parameters = inspect.signature(resolve("objectives", bare(row[0])).func).parameters
        free = [k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
        if not bare(row[0]).startswith("supervised"):  # filled by the recipe
            assert words(row) == free, row[0]
    named = {bare(row[0]) for row in rows}
    for module in ("preference", "pointwise"):
        found = importlib.import_module(f"jaxreward.objectives.{module}")
        public = inspect.getmembers(found, inspect.isfunction)
        ours = {
            f"{module}.{k}" for k, f in public if f.__module__ == found.__name__ and k[0] != "_"
        }
        assert ours <= named


def test_the_rules_of_resuming_are_those_of_the_command():
    """Catches a page that promises, or hides, that a key may change."""
    part = read("docs/configs.md").partition("## Resuming")[2]
    named = set(re.findall(rf"`((?:{SECTIONS})\.[\w.]+)`", part))
    assert named == {*overrides.MAY_CHANGE, "train.steps", "models.policy.init"}


def test_the_quoted_refusal_is_what_the_command_says():
    """Catches a reworded message, and `near` that finds nothing near."""
    quoted = re.search(r"^    jaxreward train: error: (unknown key .*), \.\.\.$", *page_and_flags())
    with pytest.raises(KeyError) as error:
        presets.load("reward_model/bradley_terry", ["optim.lrr=1"])
    assert error.value.args[0].startswith(quoted[1])


def page_and_flags():
    return read("docs/configs.md"), re.M


def test_the_config_file_of_the_page_loads(tmp_path):
    """Catches an example that the loader refuses."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", read("docs/configs.md"), re.M | re.S)
    (tmp_path / "mine.py").write_text(block)
    config = presets.load(f"{tmp_path / 'mine.py'}:smoke,centre=0.1", ["losses.centring.coef=0.2"])
    assert config.losses.centring.coef == 0.2 and config.train.steps == 4
    assert config.optim.groups.head.lr == 10.0


# docs/data.md


@pytest.mark.parametrize(
    ("kind", "reader"),
    [("pairs", sources.read_pairs), ("points", points.read), ("conversations", conversations.read)],
    ids=["pairs", "points", "conversations"],
)
def test_the_rows_of_the_page_are_read(kind, reader, tmp_path):
    """Catches an example that the reader refuses, or that no reader is given."""
    (rows,) = re.findall(rf"^```json {kind}\n(.*?)^```$", read("docs/data.md"), re.M | re.S)
    (tmp_path / "rows.jsonl").write_text(rows)
    records, report = reader(tmp_path / "rows.jsonl")
    assert len(records) == report["kept"] == len(rows.splitlines()) >= 3


def test_the_quoted_error_is_what_the_reader_says(tmp_path):
    """Catches a message of another form: file, row and field come first."""
    quoted = re.search(r"^    (pairs\.jsonl:3:.*)$", read("docs/data.md"), re.M)[1]
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    path = tmp_path / "pairs.jsonl"
    path.write_text(2 * good + good.replace('"c"', '"b"'))
    with pytest.raises(ValueError) as error:
        sources.read_pairs(path)
    assert str(error.value) == f"{tmp_path}/{quoted}"


def test_the_table_of_data_sets_is_complete():
    """Catches a corpus that no page names, and one that is no more."""
    found = set()
    for path in (REPO / "jaxreward/data/corpora").glob("[a-z]*.py"):
        module = importlib.import_module(f"jaxreward.data.corpora.{path.stem}")
        kinds = ("pairs", "points", "prompts", "completions")
        found |= {f"{path.stem}.{kind}" for kind in kinds if callable(getattr(module, kind, None))}
    assert {bare(row[0]) for row in table("docs/data.md", "`data.corpus`")} == found


# All pages


def known_keys():
    found = {
        "losses.*.fn",
        "losses.*.coef",
        "models.policy.outputs",
        "models.policy.output_weights",
    }
    for name in (*presets.shipped(), "online_rl/math:ppo"):
        for key in keys(name):
            parts = any_name(key).split(".")
            found |= {".".join(parts[:i]) for i in range(2, len(parts) + 1)}
    found |= {f"losses.*.{word}" for row in table("docs/configs.md", "fn") for word in words(row)}
    return {any_name(key) for key in found}


@every_page
def test_keys_that_a_page_names_exist(name):
    """Catches keys that were renamed, in the pages and in their commands."""
    known = known_keys()
    code = re.findall(r"```.*?```", read(name), re.S) + re.findall(r"`([^`\n]+)`", read(name))
    found = {
        key.rstrip(".")
        for text in code
        for key in re.findall(rf"(?<![\w/.-])(?:config\.)?((?:{SECTIONS})\.[\w.*]+)", text)
    }
    missing = {
        key
        for key in found
        if any_name(key) not in known
        and not any_name(key).startswith("evals.*")
        and not key.endswith((".py", ".yaml", ".jsonl", ".json"))
        and not in_package(key)
    }
    assert missing == set()


def in_package(name):
    """Whether a dotted name is a module of the package, or something in one: not a key."""
    while "." in name:
        name, _, attribute = name.rpartition(".")
        try:
            found = importlib.util.find_spec(f"jaxreward.{name}") is not None
        except ModuleNotFoundError:
            continue
        if found:
            module = importlib.import_module(f"jaxreward.{name}")
            if hasattr(module, attribute) or not hasattr(module, "__path__"):
                return hasattr(module, attribute)
            return importlib.util.find_spec(f"jaxreward.{name}.{attribute}") is not None
    return False


@every_page
def test_commands_that_a_page_shows_are_understood(name):
    """Catches a flag, a config or an override that the command line refuses."""
    text = read(name).replace("\\\n", " ")
    for line in re.findall(r"^(?:    )?(jaxreward (?!train: )[a-z].*)$", text, re.M):
        argv = shlex.split(line, comments=True)[1:]
        if "..." in argv or "|" in argv:
            continue
        args = cli._parse(argv)
        assert args.command == argv[0]
        if args.command == "train" and not args.config.partition(":")[0].endswith(".py"):
            presets.load(args.config, args.overrides)


@every_page
def test_files_that_a_page_names_exist(name):
    """Catches files that were moved."""
    folders = "docs|tests|configs|launch|notebooks|benchmarks|jaxreward"
    found = re.findall(
        rf"(?<![\w/.])(?:{folders})/[\w/.-]*\.(?:py|md|sh|jsonl|json|ipynb|png|yaml)", read(name)
    )
    assert [path for path in found if not (REPO / path).exists() and path.lower() == path] == []


@pytest.mark.parametrize("name", SHORT)
def test_pages_stay_short(name):
    """Catches a page that nobody reads to its end."""
    lines = read(f"docs/{name}.md").splitlines()
    assert len(lines) <= 150
    wide = [i for i, line in enumerate(lines, start=1) if len(line) > 120 and line[:1] not in "|{"]
    assert wide == []


# About the project


def test_the_citation_is_valid():
    """The required fields of CFF 1.2.0; catches a version or licence that fell behind."""
    cff = yaml.safe_load(read("CITATION.cff"))
    assert cff["cff-version"] == "1.2.0" and cff["title"] and cff["message"]
    assert cff["authors"] == [{"name": "The jaxreward authors"}]
    assert cff["version"] == jaxreward.__version__
    assert f'license = "{cff["license"]}"' in read("pyproject.toml")
    fields = {"cff-version", "message", "title", "authors", "version", "license"}
    assert fields <= set(cff) <= fields | {"type", "abstract", "keywords"}
    assert cff["type"] in ("software", "dataset")


def test_the_changelog_has_a_place_for_what_comes():
    """Keep a Changelog's form: a section for the next version first, and known kinds of change."""
    page = read("CHANGELOG.md")
    versions = re.findall(r"^## \[?([\w.]+)\]?", page, re.M)
    assert versions[0] == "Unreleased"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {*re.findall(r"^### (.*)$", page, re.M)} <= kinds
