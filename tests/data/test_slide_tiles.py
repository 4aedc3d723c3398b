"""Tiles that are read from slides: the pixels of cut tiles, shifts and spacings by draw number, open files."""

import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from painted_slide import coordinates, halved, noise, write_slide
from PIL import Image

from dino.api.levels import build_level
from dino.api.tiling import tile
from dino.config.load import load_config
from dino.config.schema import PatchConfig, TileConfig
from dino.data import BadSample
from dino.data.slide_tiles import SlideTileDataset
from dino.errors import ConfigError, DataError
from dino.slides import reader, sample_slide
from dino.slides.storage import encode
from dino.slides.tables import read_tiles

SIDE = 32
ACROSS = {"aug.global_spacing_um": 1.0, "aug.local_spacing_um": 0.5}


def dataset_of(root: Path, **changes: object) -> SlideTileDataset:
    values = {"model.arch": "vit:dim=32,depth=2,heads=2", "aug.global_crops_size": 32, "aug.local_crops_size": 16}
    found = build_level(load_config(PatchConfig, overrides={**values, "data_dir": str(root), **changes})).dataset
    assert isinstance(found, SlideTileDataset)
    return found


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide whose pixels encode their position in steps of 2 px, and tiles of 32 px on all of it."""
    folder = tmp_path_factory.mktemp("painted")
    pixels = coordinates(450, 330, unit=2)
    write_slide(folder / "slides" / "painted.tiff", [pixels])
    settings = TileConfig(tile_size_px=SIDE, region_size_px=SIDE, storage="none", previews=False, num_workers=1)
    assert tile([folder / "slides"], folder / "root", settings).exit_code == 0
    return folder / "root"


def test_they_are_the_tiles_that_are_cut_before_these_are_compressed(tmp_path: Path) -> None:
    """On real tissue: the bytes that the cutting of tiles encodes are those of the pixels that training reads."""
    for storage in ("jpeg", "none"):
        assert tile([sample_slide()], tmp_path / storage, TileConfig(storage=storage, previews=False)).exit_code == 0
    dataset = dataset_of(tmp_path / "none", **{"aug.global_crops_size": 224, "aug.local_crops_size": 96})
    records = read_tiles(tmp_path / "jpeg")
    assert len(dataset) == len(records) == 44
    for i, record in enumerate(records):
        sample = dataset[i]
        assert sample.name == str(Path(record.slide_id, record.path.stem)) and sample.shape == (256, 256)
        assert encode(sample.pixels.permute(1, 2, 0).numpy(), 90) == (tmp_path / "jpeg" / record.path).read_bytes()
        assert sample.spacing_um == record.spacing_um and sample.slide_id == record.slide_id


def test_draws_are_shifted_within_the_listed_tiles_and_by_the_draw_number_alone(painted: Path) -> None:
    records = read_tiles(painted)
    listed = {(record.x, record.y) for record in records}
    dataset, same = (dataset_of(painted, **{"sampling.jitter_px": 16}) for _ in range(2))
    shifts = []
    for draw in range(400):
        record = records[draw % len(records)]
        sample = dataset.drawn(draw % len(records), draw)
        x, y = (2 * int(sample.pixels[channel].min()) for channel in (0, 1))  # to the next even px
        shifts.append((x - record.x, y - record.y))
        assert max(map(abs, shifts[-1])) <= 17
        cells = {(a - a % SIDE, b - b % SIDE) for a in (x + 1, x + SIDE - 3) for b in (y + 1, y + SIDE - 3)}
        assert cells <= listed
        assert torch.equal(same.drawn(draw % len(records), draw).pixels, sample.pixels)
    across, down = np.array(shifts).T
    assert across.std() > 6 and down.std() > 6 and abs(across.mean()) < 2 and abs(down.mean()) < 2
    assert not torch.equal(dataset.drawn(3, 7).pixels, dataset.drawn(3, 8).pixels)


def test_a_spacing_is_drawn_for_each_sample_about_the_same_centre(tmp_path: Path) -> None:
    pixels = noise(700, 500)
    write_slide(tmp_path / "slides" / "noise.tiff", [pixels, halved(pixels)], mpp=0.25)
    settings = TileConfig(tile_size_px=SIDE, region_size_px=SIDE, storage="none", previews=False, num_workers=1)
    assert tile([tmp_path / "slides"], tmp_path / "root", settings).exit_code == 0
    spacings = {"sampling.spacing_um": [0.25, 0.5, 1.0], "sampling.spacing_shares": [1, 2, 1]}
    dataset = dataset_of(tmp_path / "root", **spacings)
    records = read_tiles(tmp_path / "root")
    found = {0.25: 0, 0.5: 0, 1.0: 0}
    with openslide.OpenSlide(tmp_path / "slides" / "noise.tiff") as slide:
        inner = [i for i, r in enumerate(records) if 64 <= r.x < 500 and 64 <= r.y < 300]
        for draw in range(400):
            record = records[inner[draw % len(inner)]]
            sample = dataset.drawn(inner[draw % len(inner)], draw)
            spacing = round(float(sample.spacing_um or 0), 3)
            found[spacing] += 1
            span = round(SIDE * spacing / 0.25)
            left, top = record.x + (record.step_lv0 - span) // 2, record.y + (record.step_lv0 - span) // 2
            level = 1 if spacing >= 0.5 else 0
            read = span // (1, 2)[level]
            expected = slide.read_region((left, top), level, (read, read)).convert("RGB")
            if read != SIDE:
                expected = expected.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(sample.pixels.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert 60 < found[0.25] < 140 and 160 < found[0.5] < 240 and 60 < found[1.0] < 140


def test_pictures_of_several_spacings_have_the_same_centre_to_the_pixel(tmp_path: Path) -> None:
    """Also where a tile is shifted, or lies at the border of the slide: half of the coarse picture is the fine one."""
    write_slide(tmp_path / "slides" / "noise.tiff", [noise(450, 330)])
    settings = TileConfig(tile_size_px=SIDE, region_size_px=SIDE, storage="none", previews=False, num_workers=1)
    assert tile([tmp_path / "slides"], tmp_path / "root", settings).exit_code == 0
    dataset = dataset_of(tmp_path / "root", **ACROSS, **{"sampling.jitter_px": 16})
    places, sample = set(), dataset[0]
    for draw in range(len(dataset)):
        sample = dataset.drawn(draw, draw)
        assert sample.pixels.shape == (2, 3, SIDE, SIDE) and sample.shape == (SIDE, SIDE)
        coarse, fine = (picture.permute(1, 2, 0).numpy() for picture in sample.pixels)
        halved = np.asarray(Image.fromarray(fine).resize((SIDE // 2, SIDE // 2), Image.Resampling.BILINEAR)).astype(int)
        inner = coarse[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4].astype(int)
        assert np.abs(inner - halved)[1:-1, 1:-1].max() <= 1  # filters end at the border of a picture
        places.add(fine.tobytes())
    assert len(places) == len(dataset) and sample.spacing_um == 1.0
    assert torch.equal(dataset.drawn(5, 7).pixels, dataset.drawn(5, 7).pixels)
    assert not torch.equal(dataset.drawn(5, 7).pixels, dataset.drawn(5, 8).pixels)


def test_a_picture_at_the_spacing_of_tiling_is_the_listed_tile(painted: Path) -> None:
    dataset = dataset_of(painted, **{"aug.global_spacing_um": 1.0})
    inner = [i for i, record in enumerate(read_tiles(painted)) if 32 <= record.x < 380 and 32 <= record.y < 250]
    for index in inner:
        assert torch.equal(dataset.drawn(index, index).pixels[1], dataset[index].pixels)


def test_few_slides_are_open_and_forked_processes_open_their_own(tmp_path: Path) -> None:
    """A handle that two processes share would have one file position; the values of all of them are compared."""
    for seed in range(5):
        write_slide(tmp_path / "slides" / f"slide{seed}.tiff", [noise(200, 170, seed)])
    settings = TileConfig(tile_size_px=SIDE, region_size_px=SIDE, storage="none", previews=False, num_workers=1)
    assert tile([tmp_path / "slides"], tmp_path / "root", settings).exit_code == 0
    dataset = dataset_of(tmp_path / "root", **{"speed.open_slides": 2})
    expected = [dataset[i].pixels for i in range(len(dataset))]
    assert len(dataset._readers._open) == 2
    with multiprocessing.get_context("fork").Pool(3) as pool:
        for start in (0, 1, 2):
            found = pool.map(_sum_of(dataset), range(start, len(dataset), 3))
            assert found == [int(expected[i].sum()) for i in range(start, len(dataset), 3)]
    again = pickle.loads(pickle.dumps(dataset))
    assert not again._readers._open and torch.equal(again[3].pixels, expected[3])
    assert again.fingerprint == dataset.fingerprint


def test_the_open_slides_of_a_process_share_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        write_slide(tmp_path / "slides" / f"slide{seed}.tiff", [noise(200, 170, seed)])
    settings = TileConfig(tile_size_px=SIDE, region_size_px=SIDE, storage="none", previews=False, num_workers=1)
    assert tile([tmp_path / "slides"], tmp_path / "root", settings).exit_code == 0
    dataset, given = dataset_of(tmp_path / "root"), {}
    set_cache = openslide.OpenSlide.set_cache
    monkeypatch.setattr(openslide.OpenSlide, "set_cache", lambda s, c: (given.update({s: c}), set_cache(s, c))[1])
    for i in range(len(dataset)):
        assert dataset[i].pixels.any()
    assert len(given) == 3 and len({id(cache) for cache in given.values()}) == 1


def test_without_the_handle_of_hs2p_slides_are_read_with_a_warning(
    painted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    expected = dataset_of(painted)[0].pixels

    class Renamed:
        """hs2p's reader, whose handle has another name."""

        def __init__(self, inner: object) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> object:
            if name == "_slide":
                raise AttributeError(name)
            return getattr(self.inner, name)

    opened = reader._open
    monkeypatch.setattr(reader, "_open", lambda *arguments: Renamed(opened(*arguments)))
    reader._warn_of_own_caches.cache_clear()
    assert torch.equal(dataset_of(painted)[0].pixels, expected)
    assert torch.equal(dataset_of(painted)[0].pixels, expected)
    assert " ".join(capsys.readouterr().out.split()).count("each open slide has a cache of up to 32 MB of its own") == 1


def test_pictures_at_two_spacings_need_two_readers_however_few_slides_are_open(painted: Path) -> None:
    few, many = (dataset_of(painted, **ACROSS, **{"speed.open_slides": count}) for count in (0, 8))
    assert torch.equal(few.drawn(3, 3).pixels, many.drawn(3, 3).pixels)


class _sum_of:  # noqa: N801 - a function that can be sent to a process
    def __init__(self, dataset: SlideTileDataset) -> None:
        self.dataset = dataset

    def __call__(self, index: int) -> int:
        return int(self.dataset[index].pixels.sum())


def test_the_fingerprint_is_that_of_slides_places_and_geometry(painted: Path, tmp_path: Path) -> None:
    other = TileConfig(tile_size_px=SIDE, region_size_px=SIDE, storage="none", previews=False, spacing_um=0.51)
    assert tile([painted.parent / "slides"], tmp_path / "other", other).exit_code == 0
    prints = [dataset_of(root).fingerprint for root in (painted, painted, tmp_path / "other")]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"sampling.jitter_px": 17}, ConfigError, r"jitter_px to be from 0 to 16, half a tile, found 17"),
        ({"sampling.spacing_um": [0.5, 0.5]}, ConfigError, "different positive numbers"),
        ({"sampling.spacing_um": [0.5, 1], "sampling.spacing_shares": [1]}, ConfigError, "each of the 2 spacings"),
        ({"sampling.spacing_um": [0.25]}, DataError, r"found 'painted' of 450 x 330 px at 0.5 µm/px; leave out"),
        ({"sampling.spacing_um": [8.0]}, DataError, r"found 'painted' of 450 x 330 px"),
        ({"aug.local_spacing_um": 0.5}, ConfigError, r"different positive spacings of global and local .*_um=0.5 with"),
        (
            {**ACROSS, "aug.local_crops_number": 0},
            ConfigError,
            "found aug.global_spacing_um=1.0 and .*number=0 and tiles",
        ),
        ({**ACROSS, "sampling.spacing_um": [0.5]}, ConfigError, "found both; leave one out"),
        ({"aug.local_spacing_um": 0.25}, DataError, r"tiles at 0.25 µm/px, found 'painted' of 450 x 330 px at 0.5 µm"),
        ({"aug.global_spacing_um": 8.0}, DataError, r"tiles at 8 µm/px, found 'painted' of 450 x 330 px"),
        ({**ACROSS, "source": "files"}, ConfigError, r"for aug.global_spacing_um=1.0, found tile files"),
        ({"speed.ram_cache": 0.1}, ConfigError, r"no speed.ram_cache for tiles that are read from slides"),
        ({"source": "disk"}, ConfigError, "expected source auto, files, tar, parquet, slides"),
        ({"source": "files", "sampling.jitter_px": 3}, ConfigError, "add source=slides"),
    ],
)
def test_settings_that_do_not_fit(painted: Path, changes: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        dataset_of(painted, **changes)


def test_moved_and_missing_slides(painted: Path, tmp_path: Path) -> None:
    """A copy of the ROOT whose slides are gone: a message, and ``slides=`` with the folder that they are in now."""
    source = painted.parent / "slides" / "painted.tiff"
    moved = tmp_path / "moved"
    moved.mkdir()
    before = dataset_of(painted)
    source.rename(moved / source.name)
    try:
        with pytest.raises(DataError, match=r"files of 1 slides .* found none of 1, the first 'painted' \(recorded at"):
            dataset_of(painted)
        after = dataset_of(painted, slides=str(moved))
        assert after.fingerprint == before.fingerprint and len(after[5].pixels)
    finally:
        (moved / source.name).rename(source)


def test_a_list_without_the_slide_of_a_table(painted: Path) -> None:
    dataset = dataset_of(painted)
    assert dataset.ranges.known == {"painted"} and dataset.ranges.starts.tolist() == [0, len(dataset)]
    assert replace(dataset._placement, seed=3).draw(5) == dataset._placement.draw(5) == ((0.5,), (0.0, 0.0))


def test_a_place_that_cannot_be_decoded_costs_its_tiles_and_no_others(tmp_path: Path) -> None:
    """After an error, openslide refuses every further read through the same handle: the slide is opened again."""
    (tmp_path / "slides").mkdir()
    path = tmp_path / "slides" / "damaged.svs"
    path.write_bytes(sample_slide().read_bytes())
    assert tile([path], tmp_path / "root", TileConfig(storage="none", previews=False)).exit_code == 0
    whole = dataset_of(tmp_path / "root", **{"aug.global_crops_size": 224, "aug.local_crops_size": 96})
    expected = [whole[i].pixels for i in range(len(whole))]
    with Image.open(path) as image:
        offsets, width = image.tag_v2[324], -(-image.width // 240)  # JPEG tiles of 240 px
    content = bytearray(path.read_bytes())
    start = offsets[4 * width + 5]  # x 1200 to 1440, y 960 to 1200
    content[start : start + 300] = bytes(300)
    path.write_bytes(bytes(content))
    dataset, bad = dataset_of(tmp_path / "root", **{"aug.global_crops_size": 224, "aug.local_crops_size": 96}), []
    for i, record in enumerate(read_tiles(tmp_path / "root")):
        try:
            assert torch.equal(dataset[i].pixels, expected[i])
        except BadSample as error:
            bad.append((record.x, record.y))
            assert error.name == f"damaged/damaged_{record.x}_{record.y}" and "could not read them" in str(error)
    assert bad and all(x < 1440 and x + 256 > 1200 and y < 1200 and y + 256 > 960 for x, y in bad)
