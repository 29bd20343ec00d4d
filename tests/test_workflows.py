"""The workflows run what tox.ini has, and one check needs all of them."""

import configparser
import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
TOX = configparser.ConfigParser(interpolation=None)
TOX.read(ROOT / "tox.ini")


def environments(label=""):
    """Return the names of tox's environments, or of those that carry a label."""
    sections = [name for name in TOX.sections() if name.startswith("testenv:")]
    labelled = [name for name in sections if not label or TOX[name].get("labels", "") == label]
    return {leg for name in labelled for leg in name.removeprefix("testenv:").strip("{}").split(",")}


def test_every_leg_of_the_matrix_runs_on_the_python_that_it_names():
    legs = re.findall(r'python: "3\.(\d+)"(?:, |\n +)leg: ([\w-]+)', WORKFLOWS["ci"])
    assert {leg for _, leg in legs} == environments("matrix")
    assert all(leg.startswith(f"py3{minor}-") for minor, leg in legs if leg != "lowest")
    assert {f"3.{minor}" for minor, leg in legs if leg == "lowest"} == {
        TOX["testenv:lowest"]["base_python"].removeprefix("python")
    }


def test_the_workflows_name_environments_of_tox():
    named = {name for text in WORKFLOWS.values() for name in re.findall(r"tox -e ([\w-]+)", text)}
    assert {"lint", "actions", "types", "wheels", "sdist", "bench", "gate", "docs", "minilm", "gpu"} <= named
    listed = re.findall(r" (?:what|others): \[([\w, ]+)\]", WORKFLOWS["nightly"])  # by a variable, as the legs are
    by_variable = {name for names in listed for name in names.split(", ")}
    assert {"zoo", "transformers", "formats", "faults", "mutants"} <= by_variable
    assert (named | by_variable) - environments() == set()


def test_tox_leaves_the_place_of_the_folder_that_contributing_makes():
    """Newer ones write a file .venv otherwise."""
    assert "python -m venv .venv" in (ROOT / "CONTRIBUTING.md").read_text()
    assert TOX["tox"]["venv_redirect"] == "false"


def test_every_baseline_of_memory_has_the_figures_of_the_same_benchmarks():
    paths = [path for path in (ROOT / "benchmarks/memory").glob("*.json") if not path.stem.startswith("resident")]
    names = {path.name: set(json.loads(path.read_text())["figures"]) for path in paths}
    assert len(names) >= 6
    assert {frozenset(own) for own in names.values()} == {frozenset(names["avx2-torch2.13.json"])}


def test_the_required_check_needs_every_job():
    jobs = re.findall(r"^  (\w+):$", WORKFLOWS["ci"].partition("\njobs:\n")[2], flags=re.MULTILINE)
    needs = re.search(r"needs: \[([\w, ]+)\]", WORKFLOWS["ci"])
    assert jobs
    assert needs
    assert sorted([*needs[1].split(", "), "required"]) == sorted(jobs)


def test_every_action_is_pinned_by_commit_and_says_its_version():
    uses = [line.strip() for text in WORKFLOWS.values() for line in text.splitlines() if "uses:" in line]
    assert uses
    assert [line for line in uses if not re.fullmatch(r"- uses: [\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_the_sanitizers_run_files_that_exist():
    script = (ROOT / ".ci/asan").read_text()
    (folder, names), *others = re.findall(r"(tests/[\w/]*)test_\{([\w,]+)\}\.py", script)
    assert not others
    missing = [name for name in names.split(",") if not (ROOT / folder / f"test_{name}.py").exists()]
    assert not missing, f".ci/asan names {missing} in {folder}"


def jobs(name):
    """Return the text of each job of a workflow."""
    parts = re.split(r"^  (\w+):\n", WORKFLOWS[name].partition("\njobs:\n")[2], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def permissions(job):
    """Return the permissions of a job."""
    return dict(re.findall(r"^      ([\w-]+): (read|write) #", job, flags=re.MULTILINE))


def test_a_job_that_reads_what_others_uploaded_may_do_so():
    reading = {name: job for name, job in jobs("release").items() if "gh run download" in job}
    assert reading.keys() == {"describe", "publish", "announce"}
    assert {name: permissions(job).get("actions") for name, job in reading.items()} == dict.fromkeys(reading, "read")


def test_what_runs_beside_an_identity_of_the_project_is_pinned():
    """Of a job that may speak for the project, every tool has a hash; it runs no file of the repository."""
    speaking = [job for name in WORKFLOWS for job in jobs(name).values() if "id-token" in permissions(job)]
    (job,) = speaking
    installs = re.findall(r"pip install .*", job)
    assert len(installs) == 1
    assert "--require-hashes" in installs[0]
    assert "-r .ci/publish.txt" in installs[0]
    assert not re.search(r"\b(tox|npx|python3? \.ci|python3? -c)\b", job)
    pinned = (ROOT / ".ci/publish.txt").read_text()
    assert re.fullmatch(r"(#.*\n)*uv==[\d.]+ --hash=sha256:[0-9a-f]{64}\n", pinned)


def test_a_release_is_of_a_green_commit_and_says_which_run_built_it():
    told = jobs("release")
    assert ".ci/release.py green" in told["check"]
    assert permissions(told["check"])["actions"] == "read"
    assert all("check" in re.search(r"needs: (.*)", told[name])[1] for name in ("wheels", "sdist"))
    attested, published = (
        told["publish"].index("attest-build-provenance@"),
        told["publish"].index("uv publish --trusted"),
    )
    assert attested < published
    assert permissions(told["publish"])["attestations"] == "write"
    assert '.ci/release.py check "$TAG" dist/*' in told["describe"]


def test_the_required_check_runs_for_what_a_queue_merges():
    assert re.search(r"^on:\n(  .*\n)*  merge_group:\n", WORKFLOWS["ci"], flags=re.MULTILINE)
    assert "github.event.merge_group.base_sha" in jobs("ci")["gate"]  # there is no commit before it


def test_the_required_check_depends_on_no_other_site_and_no_new_linter():
    docs, links = TOX["testenv:docs"], TOX["testenv:links"]
    assert "LOWMEM_LINKS" not in docs.get("set_env", "")
    assert "LOWMEM_LINKS" not in docs.get("pass_env", "")
    assert "LOWMEM_LINKS" in links["set_env"]
    assert "links" in re.search(r"others: \[(.*)\]", WORKFLOWS["nightly"])[1]
    assert "tox -e links" not in WORKFLOWS["ci"]
    for name in ("lint", "types", "actions", "wheels"):
        deps = [
            line for line in TOX[f"testenv:{name}"]["deps"].split("\n") if line and not line.startswith("torch>=")
        ]
        assert deps == [f"-r {{tox_root}}/.ci/{name}.txt"], name
        lines = (ROOT / f".ci/{name}.txt").read_text().splitlines()
        assert [line for line in lines if not re.fullmatch(r"#.*|[\w\[\]-]+==[\d.]+", line)] == [], name


def test_no_job_downloads_cuda_and_every_image_is_named_by_its_digest():
    """The wheels' own images are cibuildwheel's, which names them by digest, too."""
    for name, text in WORKFLOWS.items():
        head = text.partition("\njobs:\n")[0]
        assert "\n  PIP_EXTRA_INDEX_URL: https://download.pytorch.org/whl/cpu\n" in head, name
        images = re.findall(r"^ +(?:container|image): *(\S.*)", text, flags=re.MULTILINE)
        assert [image for image in images if not re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", image)] == [], name
    assert "\n  UV_TORCH_BACKEND: cpu\n" in WORKFLOWS["ci"]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert settings["linux"]["environment-pass"] == ["PIP_EXTRA_INDEX_URL"]


def test_a_night_that_fails_is_told_and_tries_torchs_next_version():
    found = jobs("nightly")
    needs = re.search(r"needs: \[([\w, ]+)\]", found["tell"])[1].split(", ")
    assert sorted([*needs, "tell"]) == sorted(found)
    assert permissions(found["tell"]) == {"issues": "write"}
    assert "gh issue create" in found["tell"]
    assert "tox -e prerelease" in found["prerelease"]
    assert "prerelease" not in WORKFLOWS["ci"]
