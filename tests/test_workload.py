"""Workloads: the packaged networks against their published sizes, reading, writing, and every refusal."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from convdispatch.errors import ArgumentError, ArgumentTypeError, WorkloadError
from convdispatch.problem import Problem
from convdispatch.tuning.workload import Layer, Workload, load, packaged

SMALL = Problem.parse("1x8x8x4 * 3x3x4x8 SAME")
OTHER = Problem.parse("2x9x9x4 * 1x1x4x8 VALID stride=2")
PACKAGED = (
    "downsampling1080p", "efficientnet_b0", "filters1080p", "first_layers", "last_layers", "mixed", "mobilenetv2",
    "resnet50", "signals", "smoothing1080p", "unet", "vgg16",
)  # fmt: skip


def convolutions(workload: Workload) -> int:
    return sum(layer.count for layer in workload.layers)


def weights(workload: Workload) -> int:
    return sum(layer.count * layer.problem.taps * layer.problem.k for layer in workload.layers)


def flops(workload: Workload) -> int:
    return sum(layer.count * layer.problem.flops for layer in workload.layers)


def test_packaged_names() -> None:
    assert packaged() == PACKAGED


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_files_are_canonical_distinct_and_sourced(name: str) -> None:
    workload = load(name)
    assert workload.name == name
    assert workload.title
    assert workload.source
    assert workload.distinct() == workload
    names = [layer.name for layer in workload.layers]
    assert all(names)
    assert len(set(names)) == len(names)
    for layer in workload.layers:
        assert layer.problem.n == 1
        assert layer.problem.dtype == "float32"
        assert bool(layer.problem.epilogue) == (name == "efficientnet_b0")  # elsewhere it is left to the user
    text = Path(__file__).parents[1].joinpath("configs", f"{name}.yaml").read_text("utf-8")
    assert all(f'problem: "{layer.problem.text}"' in text for layer in workload.layers)


# Multiply-adds and parameters as on the model pages of torchvision (whose GFLOPS count a multiply-add once).
# Parameters that are no convolution's weights (fully connected, normalisation, bias) are taken off here.
@pytest.mark.parametrize(
    ("name", "count", "gmacs", "dense", "parameters", "others"),
    [
        ("resnet50", 53, 4.09, 2048 * 1000, 25_557_032, 2048 * 1000 + 1000 + 2 * 26_560),
        ("vgg16", 13, 15.47, 25_088 * 4096 + 4096 * 4096 + 4096 * 1000, 138_357_544,
         25_088 * 4096 + 4096 * 4096 + 4096 * 1000 + 2 * 4096 + 1000 + 4224),
        ("mobilenetv2", 52, 0.30, 1280 * 1000, 3_504_872, 1280 * 1000 + 1000 + 2 * 17_056),
        ("efficientnet_b0", 81, 0.39, 1280 * 1000, 5_288_548, 1280 * 1000 + 1000 + 2 * 21_008 + 9340),
    ],
)  # fmt: skip
def test_networks_have_their_published_size(
    name: str, count: int, gmacs: float, dense: int, parameters: int, others: int
) -> None:
    workload = load(name)
    assert convolutions(workload) == count
    assert (flops(workload) // 2 + dense) / 1e9 == pytest.approx(gmacs, abs=0.005)
    assert weights(workload) == parameters - others


def test_vgg16_convolutions_alone() -> None:
    assert flops(load("vgg16")) // 2 / 1e9 == pytest.approx(15.35, abs=0.005)


def test_resnet50_strides_in_the_3x3() -> None:
    strided = [layer.problem for layer in load("resnet50").layers if layer.problem.strides == (2, 2)]
    assert sorted(problem.kh for problem in strided) == [1, 1, 1, 3, 3, 3, 7]
    assert all(problem.k > problem.c for problem in strided if problem.kh == 1)  # shortcuts only


def test_mobilenetv2_has_seventeen_depthwise_layers() -> None:
    layers = [layer for layer in load("mobilenetv2").layers if layer.problem.groups > 1]
    assert sum(layer.count for layer in layers) == 17
    assert all(layer.problem.groups == layer.problem.c == layer.problem.k for layer in layers)


def test_unet_follows_figure_1_of_its_paper() -> None:
    workload = load("unet")
    up_convolutions = 4
    assert convolutions(workload) + up_convolutions == 23
    size, previous = 572, 1
    for layer in workload.layers:
        problem = layer.problem
        if problem.h < size:  # a 2x2 pooling
            assert problem.h * 2 == size
        elif problem.h > size:  # an up-convolution halves the channels, the crop doubles them again
            assert problem.h == size * 2
        assert problem.c == previous
        assert problem.pads == (0, 0, 0, 0)
        size, previous = problem.oh, problem.k
    assert (size, previous) == (388, 2)


def test_filters_keep_the_frame() -> None:
    problems = [layer.problem for layer in load("filters1080p").layers]
    assert all(problem.output_shape[:3] == (1, 1080, 1920) for problem in problems)
    assert sorted((problem.kh, problem.k) for problem in problems) == [
        (3, 1), (3, 2), (5, 1), (7, 1), (9, 1), (15, 8), (31, 1),
    ]  # fmt: skip


def test_smoothing_filters_are_separable_and_keep_the_frame() -> None:
    for layer in load("smoothing1080p").layers:
        assert layer.problem.separable
        assert layer.problem.output_shape[1:3] in {(1080, 1920), (540, 960)}


def test_downsampling_filters_keep_some_pixels() -> None:
    for layer in load("downsampling1080p").layers:
        p = layer.problem
        assert p.strides[0] == p.strides[1] > 1
        assert (p.oh, p.ow) == (-(-p.h // p.strides[0]), -(-p.w // p.strides[1]))


def test_with_batch_replaces_every_n() -> None:
    workload = load("resnet50").with_batch(8)
    assert {layer.problem.n for layer in workload.layers} == {8}
    assert flops(workload) == 8 * flops(load("resnet50"))
    assert workload.with_batch(1) == load("resnet50")


@pytest.mark.parametrize("n", [0, -1])
def test_with_batch_refuses_values(n: int) -> None:
    with pytest.raises(ArgumentError, match=r"batch must be a whole number of at least 1; got"):
        load("vgg16").with_batch(n)


@pytest.mark.parametrize("n", [1.0, "2", True, None])
def test_with_batch_refuses_types(n: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="batch must be a whole number"):
        load("vgg16").with_batch(n)


def test_distinct_keeps_first_place_and_adds_counts() -> None:
    workload = Workload("w", (Layer(SMALL, 2, "a"), Layer(OTHER, 1, "b"), Layer(SMALL, 3, "c")))
    assert workload.distinct().layers == (Layer(SMALL, 5, "a"), Layer(OTHER, 1, "b"))


@pytest.mark.parametrize("what", [SMALL, SMALL.text, "1x8x8x4 * 3x3x4x8 pad=1"])
def test_load_of_one_problem(what: Problem | str) -> None:
    assert load(what) == Workload(SMALL.text, (Layer(SMALL),))


def test_load_of_a_workload_is_itself() -> None:
    workload = load(SMALL)
    assert load(workload) is workload


def test_load_of_an_iterable() -> None:
    items: list[Problem | str | Layer] = [SMALL, OTHER.text, Layer(SMALL, 4, "x")]
    assert load(iter(items)).layers == (Layer(SMALL), Layer(OTHER), Layer(SMALL, 4, "x"))


@pytest.mark.parametrize("what", [3, None, b"resnet50", {"layers": []}])
def test_load_refuses_types(what: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="workload must be a packaged name, a path"):
        load(what)


@pytest.mark.parametrize("name", PACKAGED)
def test_dump_and_load_round_trip(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    load(name).dump(path)
    assert load(path) == load(str(path)) == load(name)
    assert {file.name for file in tmp_path.iterdir()} == {"w.yaml", "w.yaml.lock"}


def test_dump_goes_through_a_link_and_keeps_who_may_read(tmp_path: Path) -> None:
    path, link = tmp_path / "w.yaml", tmp_path / "link.yaml"
    path.touch(0o660)
    path.chmod(0o660)
    link.symlink_to(path)
    load(SMALL).dump(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o660
    assert load(path) == load(SMALL)


@pytest.mark.parametrize("word", ["null", "1", "a: b", "- x", "#", "'", '"', "two\nlines", "größe", "\x07", "*a"])
def test_awkward_words_round_trip(word: str, tmp_path: Path) -> None:
    workload = Workload(word, (Layer(SMALL, 1, word), Layer(OTHER)), word, word)
    workload.dump(tmp_path / "w.yaml")
    assert load(tmp_path / "w.yaml") == workload


def test_dump_says_why_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"missing.w\.yaml: the workload cannot be written: .*No such file"):
        load(SMALL).dump(tmp_path / "missing" / "w.yaml")
    (tmp_path / "taken").mkdir()
    with pytest.raises(WorkloadError, match="cannot be written"):
        load(SMALL).dump(tmp_path / "taken")
    assert {file.name for file in tmp_path.iterdir()} == {"taken"}


def test_short_forms_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(f"layers:\n- {SMALL}\n- {{problem: '{OTHER}', count: 2}}\n", "utf-8")
    assert load(str(path)) == Workload("mine", (Layer(SMALL), Layer(OTHER, 2)))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "resnet5",
            "no packaged workload is called 'resnet5'; did you mean resnet50[?] packaged are downsampling1080p, ",
        ),
        ("VGG-16", "did you mean vgg16[?]"),
        (
            "zzz",
            r"called 'zzz'; packaged are .*vgg16; or give a file such as ./zzz.yaml, or a problem",
        ),
        ("", "called ''; packaged are"),
        ("x.yaml", r"^x\.yaml: this file does not exist; packaged workloads are downsampling1080p, "),
        ("./nowhere", "^nowhere: this file does not exist"),
        ("a*b.yaml", r"^a\*b\.yaml: this file does not exist"),
        ("1x8x8x4 * 3x3x4", "^workload: problem .* the filter shape must be four numbers"),
        ("1x8x8x4 * 3x3x4x8 SOME", "'SOME' is not understood"),
        ([], "workload 'custom' has no layers; it needs at least one problem"),
        ([SMALL, "1x2x2x1"], "^workload, layer 2: problem '1x2x2x1': it needs an input shape"),
        ([SMALL, 7], "^workload, layer 2: problem must be text such as .* got 7"),
    ],
)
def test_load_explains_what_it_cannot_find(what: "str | Iterable[Any]", message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        load(what)


ROW = "problem: '1x8x8x4 * 3x3x4x8 SAME'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "w.yaml: a workload file needs 'layers:', a list of at least one problem"),
        ("just words", "needs 'layers:'"),
        ("layers: []", "needs 'layers:'"),
        ("layers: {a: 1}", "needs 'layers:'"),
        (f"layer: [{{{ROW}}}]", "needs 'layers:'"),
        (f"titel: x\nlayers: [{{{ROW}}}]", "w.yaml: 'titel' is not a known key; did you mean title[?]"),
        (f"name: 7\nlayers: [{{{ROW}}}]", "w.yaml: name must be text; got 7"),
        (f"layers:\n- {{{ROW}}}\n- {{{ROW}, cuont: 2}}", "layer 2: 'cuont' is not .* did you mean count"),
        (f"layers: [{{{ROW}, name: c1, zzz: 2}}]", r"\(c1\): 'zzz' .* known are name, count, problem"),
        (f"layers: [{{{ROW}, name: 7}}]", "layer 1: name must be text; got 7"),
        ("layers: [{name: c1, count: 2}]", r"layer 1 \(c1\): there is no problem; add one such"),
        ("layers: [{problem: 12}]", "layer 1: problem must be text .* got 12"),
        ("layers: ['1x8x8x4 * 3x3x5x8']", "layer 1: problem .* 4 input channels are no multiple"),
        ("layers: [null]", "layer 1: problem must be text"),
        *((f"layers: [{{{ROW}, count: {count}}}]", "layer 1: count must be a whole number of at least 1; got")
          for count in ("0", "-2", "1.5", "2.0", "yes", "'3'", "null", "[1]", ".inf")),
        ("layers:\n- {problem: [}", "w.yaml, line 2: this is not YAML"),
        ("a: 1\nlayers: : x", "w.yaml, line 2: this is not YAML"),
        ("a: 1\n---\nb: 2", "w.yaml, line 2: this is not YAML"),
        ("layers: 2020-99-99", "w.yaml: this is not YAML: month must be"),
        ("layers: \x00", "w.yaml: this is not YAML: unacceptable character"),
        ("layers:\n- !!python/object/apply:os.abort []", "line 2: this is not YAML: could not determine"),
        ("a: &a [1]\nlayers: *a", "w.yaml, line 2: aliases are not read here"),
        ("a: 1\nlayers:\n- {problem: 1x4, problem: 1x5}", "w.yaml, line 3: 'problem' stands twice in the same place"),
        ("layers: []\nname: a\nlayers: [1]", "w.yaml, line 3: 'layers' stands twice in the same place"),
        ("a: 1\nlayers: " + "[" * 200_000, "w.yaml, line 2: nothing here is nested so deeply"),
        ("#" * (16 << 20) + "\n", "w.yaml: a workload file has at most 16777216 bytes"),
    ],
)  # fmt: skip
def test_broken_files_say_where_and_what(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(WorkloadError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(WorkloadError, match=r"model\.bin: this is not YAML"):
        load(str(path))
    with pytest.raises(WorkloadError, match="this file cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("count", [True, 1.0, "1", None])
def test_layer_refuses_types(count: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="count must be a whole number of at least 1; got"):
        Layer(SMALL, count)


def test_made_by_hand_is_checked_too() -> None:
    text: Any = SMALL.text
    layers: Any = [Layer(SMALL)]
    name: Any = 3
    with pytest.raises(ArgumentTypeError, match="problem must be a Problem; got '1x8x8x4"):
        Layer(text)
    with pytest.raises(ArgumentError, match="count must be"):
        Layer(SMALL, 0)
    with pytest.raises(ArgumentTypeError, match="name must be text; got 3"):
        Layer(SMALL, 1, name)
    with pytest.raises(ArgumentTypeError, match="layers must be a tuple of Layer"):
        Workload("w", layers)
    with pytest.raises(ArgumentTypeError, match="name must be text; got 3"):
        Workload(name, tuple(layers))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("threads: 100000", "threads must be a whole number from 1 to 9999"),
        (f"seconds: 1{'0' * 400}", "seconds must be a number of at least 0; got 1"),
        (f"count: 1{'0' * 400}", "count must be a whole number of at least 1, and at most"),
    ],
)
def test_numbers_that_nothing_could_be_done_with_are_refused(words: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"layers:\n- {{problem: '1x9x9x4 * 3x3x4x8 SAME', {words}}}\n")
    with pytest.raises(WorkloadError, match=said) as failed:
        load(file)
    assert len(str(failed.value)) < 300
