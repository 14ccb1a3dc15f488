"""What every Registry promises. A subclass gives `registry`, `make_model` (bytes of a sound model that differ by seed),
`damage` (the stored bytes change behind the registry's back) and is collected where it stands."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.ports import BadInput, ModelVersion, NotThere, Refused, Registry, Submission

MakeModel = Callable[[int], Path]
EXPECTED = "x.0,x.1,prediction\n1.0,2.0,0.5\n"


class RegistryContract:
    """Inherit it; `name` is a model's name that this test alone uses."""

    @pytest.fixture
    def name(self, request: pytest.FixtureRequest) -> str:
        return f"model-{abs(hash(request.node.nodeid))}"

    def test_a_version_has_the_digest_of_the_bytes_and_gives_exactly_them_back(
        self, registry: Registry, make_model: MakeModel, name: str, tmp_path: Path
    ) -> None:
        onnx = make_model(1)
        made = registry.register(Submission(name, str(onnx)))
        assert made.digest == hashlib.sha256(onnx.read_bytes()).hexdigest()
        assert (made.model, made.version) == (name, "1")
        assert [t.name for t in made.signature.inputs] == ["x"]
        bundle = registry.fetch(made)
        assert bundle.onnx.read_bytes() == onnx.read_bytes()
        assert (bundle.validation, bundle.reference, bundle.expected) == (None, None, None)

    def test_the_same_bytes_are_the_same_version_however_often_and_whatever_the_file_is_called(
        self, registry: Registry, make_model: MakeModel, name: str, tmp_path: Path
    ) -> None:
        onnx = make_model(1)
        first = registry.register(Submission(name, str(onnx)))
        again = tmp_path / "another-name.onnx"
        again.write_bytes(onnx.read_bytes())
        assert registry.register(Submission(name, str(again))).version == first.version
        other = registry.register(Submission(name, str(make_model(2))))
        assert (first.version, other.version) == ("1", "2")
        assert [v.version for v in registry.versions(name)] == ["1", "2"]

    def test_the_signature_beside_a_file_is_the_version_s_also_if_it_comes_later(
        self, registry: Registry, make_model: MakeModel, name: str
    ) -> None:
        onnx = make_model(1)
        assert registry.register(Submission(name, str(onnx))).signed == ""
        Path(f"{onnx}.sig").write_text("c2lnbmVk\n")
        assert registry.register(Submission(name, str(onnx))).signed == "c2lnbmVk"
        assert [version.signed for version in registry.versions(name)] == ["c2lnbmVk"]
        assert registry.version(name, "1").signed == "c2lnbmVk"

    def test_files_come_back_as_given_and_files_given_later_replace_them(
        self, registry: Registry, make_model: MakeModel, name: str, tmp_path: Path
    ) -> None:
        first, second = tmp_path / "a.csv", tmp_path / "b.csv"
        first.write_text(EXPECTED)
        second.write_text(EXPECTED + "3.0,4.0,0.25\n")
        onnx = str(make_model(1))
        made = registry.register(Submission(name, onnx, validation=first, expected=first, metrics={"auc": 0.7}))
        bundle = registry.fetch(made)
        assert bundle.validation is not None
        assert bundle.validation.read_bytes() == first.read_bytes()
        assert bundle.reference is None
        made = registry.register(Submission(name, onnx, validation=second))
        bundle = registry.fetch(registry.version(name, made.version))
        assert bundle.validation is not None
        assert bundle.expected is not None
        assert bundle.validation.read_bytes() == second.read_bytes()
        assert bundle.expected.read_bytes() == first.read_bytes()

    def test_a_version_of_another_model_can_be_handed_in(
        self, registry: Registry, make_model: MakeModel, name: str
    ) -> None:
        first = registry.register(Submission(name, str(make_model(1))))
        copy = registry.register(Submission(name + "-copy", f"models:/{name}/1"))
        assert (copy.model, copy.version, copy.digest) == (name + "-copy", "1", first.digest)

    def test_aliases_name_one_version_or_none_and_setting_twice_is_setting_once(
        self, registry: Registry, make_model: MakeModel, name: str
    ) -> None:
        registry.register(Submission(name, str(make_model(1))))
        registry.register(Submission(name, str(make_model(2))))
        assert registry.by_alias(name, "champion") is None
        for version in ("1", "2", "2"):
            registry.set_alias(name, "champion", version)
        found = registry.by_alias(name, "champion")
        assert found is not None
        assert found.version == "2"
        for _ in range(2):
            registry.set_alias(name, "champion", None)
        assert registry.by_alias(name, "champion") is None

    def test_tags_are_kept_and_the_last_value_counts(
        self, registry: Registry, make_model: MakeModel, name: str
    ) -> None:
        registry.register(Submission(name, str(make_model(1))))
        registry.tag(name, "1", {"outcome": "promoted", "why": "all gates"})
        registry.tag(name, "1", {"outcome": "rolled back"})
        tags = registry.version(name, "1").tags
        assert (tags["outcome"], tags["why"]) == ("rolled back", "all gates")

    def test_what_is_asked_for_can_be_seen_and_is_taken_back_from_the_version_that_it_named_only(
        self, registry: Registry, make_model: MakeModel, name: str
    ) -> None:
        assert list(registry.listed(name)) == []
        for seed in (1, 2):
            registry.register(Submission(name, str(make_model(seed))))
        registry.tag(name, "2", {"a": "b"})
        registry.set_alias(name, "candidate", "2")
        listed = registry.listed(name)
        assert [each.version for each in listed] == ["1", "2"]
        assert listed[0].made_at < listed[1].made_at
        assert listed[1].tags["a"] == "b"
        registry.drop_alias(name, "candidate", "1")
        assert {each.model: dict(each.aliases) for each in registry.models()}[name] == {"candidate": "2"}
        for _ in range(2):
            registry.drop_alias(name, "candidate", "2")
        assert {each.model: dict(each.aliases) for each in registry.models()}[name] == {}

    def test_what_was_measured_can_be_recorded_again(
        self, registry: Registry, make_model: MakeModel, name: str, tmp_path: Path
    ) -> None:
        made = registry.register(Submission(name, str(make_model(1))))
        report = tmp_path / "report.html"
        report.write_text("<p>fine</p>")
        for _ in range(2):
            link = registry.record(made, {"quality[origin=EWR]": 0.7, "p99_ms": 3.5}, [report])
        assert made.run_id in link
        with pytest.raises(BadInput, match=r"gone\.html"):
            registry.record(made, {}, [tmp_path / "gone.html"])

    def test_what_is_not_there_is_not_there(self, registry: Registry, make_model: MakeModel, name: str) -> None:
        assert list(registry.versions(name)) == []
        for absent in (
            lambda: registry.version(name, "1"),
            lambda: registry.version(name, "one"),
            lambda: registry.by_alias(name, "champion"),
            lambda: registry.register(Submission(name, f"models:/{name}/7")),
            lambda: registry.register(Submission(name, "runs:/0123456789abcdef0123456789abcdef/model")),
        ):
            with pytest.raises(NotThere):
                absent()
        registry.register(Submission(name, str(make_model(1))))
        with pytest.raises(NotThere):
            registry.set_alias(name, "champion", "2")
        with pytest.raises(NotThere):
            registry.tag(name, "2", {"a": "b"})

    def test_what_cannot_be_used_is_refused_by_name_and_leaves_nothing_behind(
        self, registry: Registry, make_model: MakeModel, name: str, tmp_path: Path
    ) -> None:
        corrupt = tmp_path / "corrupt.onnx"
        corrupt.write_bytes(make_model(1).read_bytes()[1:-7])
        words = tmp_path / "model.pkl"
        words.write_text("x")
        good = str(make_model(1))
        for submission, named in (
            (Submission(name, str(corrupt)), "corrupt.onnx"),
            (Submission(name, str(tmp_path / "absent.onnx")), "absent.onnx"),
            (Submission(name, str(words)), "model.pkl"),
            (Submission(name, good, validation=tmp_path / "absent.csv"), "absent.csv"),
            (Submission("a/b", good), "a/b"),
        ):
            with pytest.raises(BadInput, match=named):
                registry.register(submission)
        assert list(registry.versions(name)) == []

    def test_other_bytes_than_the_registered_ones_are_never_handed_out(
        self, registry: Registry, make_model: MakeModel, name: str, damage: Callable[[ModelVersion], None]
    ) -> None:
        made = registry.register(Submission(name, str(make_model(1))))
        damage(made)
        with pytest.raises(Refused):
            registry.fetch(made)
