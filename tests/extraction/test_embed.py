import threading
from dataclasses import replace

import pytest
import tiny_models
import torch
from forked import exit_codes, fork_group

from dino import distributed
from dino.errors import ConfigError, DataError
from dino.extraction.embed import FileEmbedder, at_input_size, batches, embed, identity, normaliser, read_ahead
from dino.models.backbone import BackboneSpec, build_backbone

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def backbone():
    return build_backbone(BackboneSpec("vit:dim=32,depth=2,heads=2", "patch", 3, (32, 32), 16), seed=0)


@pytest.fixture(scope="module")
def tiles():
    return torch.randint(0, 256, (12, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-6), ("fp32", 1e-5), ("bf16", 0.02)])
def test_features_do_not_depend_on_the_batch_size(backbone, tiles, precision, tolerance):
    normalise = normaliser(MEAN, STD, 16)
    big = embed(backbone, [tiles], normalise, CPU, precision)
    small = embed(backbone, tiles.split(1), normalise, CPU, precision)
    assert big.dtype == torch.float32 and big.shape == (12, 32)
    torch.testing.assert_close(small, big, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("own", "asked", "size"), [(518, None, 518), (518, 256, 256), (64, 30, 32), (None, 64, None)])
def test_only_models_that_resize_tiles_take_another_input_size(own, asked, size):
    loaded = tiny_models.mean_colour()  # patches of 16 px
    loaded = replace(loaded, transform=replace(loaded.transform, input_size_px=own))
    assert at_input_size(loaded, asked).transform.input_size_px == size
    assert at_input_size(replace(loaded, transform=None), asked).transform is None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_chunks_of_several_threads_are_concatenated_in_order(backbone, tiles, threads):
    normalise = normaliser(MEAN, STD, 16)
    one_by_one = embed(backbone, tiles.split(1), normalise, CPU, "fp64")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = embed(backbone, tiles.split(7), normalise, CPU, "fp64")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, one_by_one, rtol=0, atol=1e-6)


def test_features_equal_those_of_the_backbone(backbone, tiles):
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        wanted = backbone((tiles / 255 - mean) / std).cls
    torch.testing.assert_close(embed(backbone, tiles.split(5), normaliser(MEAN, STD, 16), CPU, "fp32"), wanted)


def test_training_modes_and_dtype_are_restored(backbone, tiles):
    backbone.train()
    backbone.vit.blocks[0].eval()
    features = embed(backbone, [tiles], normaliser(MEAN, STD, 16), CPU, "fp64")
    assert backbone.training and backbone.vit.blocks[1].training and not backbone.vit.blocks[0].training
    assert next(backbone.parameters()).dtype == torch.float32
    (features * torch.ones(32, requires_grad=True)).sum().backward()  # fails for an inference tensor


def test_weights_cast_once_give_the_features_of_autocast_and_are_restored_exactly(backbone, tiles, monkeypatch):
    monkeypatch.setattr("dino.precision.cpu_has_bf16", lambda: True)
    normalise = normaliser(MEAN, STD, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = torch.cat([backbone(normalise(one)).cls.float() for one in tiles.split(1)])
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    pointers = {name: tensor.data_ptr() for name, tensor in backbone.state_dict().items()}
    assert torch.equal(embed(backbone, tiles.split(1), normalise, CPU, "bf16"), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert {name: tensor.data_ptr() for name, tensor in backbone.state_dict().items()} == pointers


def test_training_modes_are_restored_after_an_error(backbone):
    backbone.train()
    with pytest.raises(ConfigError):
        embed(backbone, [torch.zeros(1, 5, 32, 32, dtype=torch.uint8)], identity, CPU, "fp32")
    assert backbone.training


def test_tiles_are_resized_to_a_multiple_of_the_patch_size_without_cropping():
    tile = torch.zeros(1, 3, 50, 71, dtype=torch.uint8)
    tile[..., :4] = 255  # a bright border, which a centre crop would remove
    normalised = normaliser((0, 0, 0), (1, 1, 1), 16)(tile)
    assert normalised.shape[-2:] == (48, 64)
    assert normalised[..., 0].mean() > 0.9 and normalised[..., -1].mean() < 0.1
    assert normaliser((0, 0, 0), (1, 1, 1), 16, (224, 224))(tile).shape[-2:] == (224, 224)


def test_grids_are_embedded_without_normalisation():
    backbone = build_backbone(BackboneSpec("vit:dim=16,depth=1,heads=2", "region", 8, (4, 4), 1), seed=0)
    grids = torch.randn(3, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = backbone(grids).cls
    torch.testing.assert_close(embed(backbone, [grids], identity, CPU, "fp32"), wanted)


def test_non_finite_features_are_an_error(backbone):
    with pytest.raises(DataError, match="finite"):
        embed(backbone, [torch.full((1, 3, 32, 32), torch.nan)], identity, CPU, "fp32")


def test_no_batches_give_no_features(backbone):
    assert embed(backbone, [], identity, CPU, "fp32").shape == (0, 32)


def test_unknown_precisions_are_rejected(backbone, tiles):
    with pytest.raises(ConfigError, match="fp16"):
        embed(backbone, [tiles], normaliser(MEAN, STD, 16), CPU, "fp16")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_is_kept(workers):
    assert list(read_ahead(lambda i: i * i, range(50), workers, ahead=4)) == [i * i for i in range(50)]


def test_the_number_of_items_read_ahead_is_bounded():
    read = []
    stream = read_ahead(lambda i: read.append(i) or i, range(100), 2, ahead=5)
    for _ in range(10):
        next(stream)
    assert len(read) <= 10 + 5
    stream.close()
    assert len(read) < 20


def test_reading_happens_in_other_threads():
    assert threading.main_thread() not in set(read_ahead(lambda _: threading.current_thread(), range(4), 2))


def test_an_error_is_raised_after_the_results_before_it():
    def read(i):
        if i == 3:
            raise ValueError("third")
        return i

    stream = read_ahead(read, range(10), 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="third"):
        next(stream)


def test_batches_break_where_the_shape_changes():
    shapes = [(1, 2), (1, 2), (1, 2), (1, 3), (1, 2)]
    assert [tuple(b.shape) for b in batches([torch.zeros(s) for s in shapes], 2)] == [
        (2, 1, 2),
        (1, 1, 2),
        (1, 1, 3),
        (1, 1, 2),
    ]


@pytest.fixture
def files(tiles, tmp_path):
    """One file per tile, and the function that reads it."""
    paths = [tmp_path / f"{i}.pt" for i in range(len(tiles))]
    for path, tile in zip(paths, tiles, strict=True):
        torch.save(tile.clone(), path)

    def read(path):
        try:
            return torch.load(path, weights_only=True)
        except OSError as error:
            raise DataError(f"expected a tile at {path}, found none") from error

    return paths, read


def mean_colour(batch):
    return batch.float().mean((2, 3))


def test_files_are_embedded_in_their_order_and_read_once(backbone, tiles, files):
    paths, read = files
    seen, counts = [], []
    embedder = FileEmbedder(paths, lambda p: seen.append(p) or read(p), normaliser(MEAN, STD, 16), CPU, "fp64", 5, 0)
    features, colours = embedder.embed(backbone, mean_colour, advance=counts.append)
    torch.testing.assert_close(features, embed(backbone, [tiles], normaliser(MEAN, STD, 16), CPU, "fp64"))
    assert torch.equal(colours, tiles.float().mean((2, 3)))
    assert seen == paths and counts == [5, 5, 2]


@pytest.mark.parametrize("count", [12, 5, 1])
def test_two_processes_embed_every_second_file_and_get_all_features(backbone, tiles, files, tmp_path, count):
    paths, read = files
    embedder = FileEmbedder(paths[:count], read, normaliser(MEAN, STD, 16), CPU, "fp64", 4, 0)

    def work():
        with distributed.process_group(CPU, 1):
            found = embedder.embed(backbone, mean_colour)
            assert len(embedder.own_paths) == len(range(distributed.rank(), count, 2))
            torch.save(found, tmp_path / f"rank{distributed.rank()}.pt")

    assert exit_codes(fork_group(work, 2)) == [0, 0]
    for rank in range(2):
        features, colours = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        wanted = embed(backbone, [tiles[:count]], normaliser(MEAN, STD, 16), CPU, "fp64")
        torch.testing.assert_close(features, wanted)
        assert torch.equal(colours, mean_colour(tiles[:count]))


def test_a_file_that_one_process_cannot_read_is_an_error_on_both(backbone, files, tmp_path):
    paths, read = files
    paths[3].unlink()

    def work():
        with distributed.process_group(CPU, 1):
            with pytest.raises(DataError, match=r"3\.pt"):
                FileEmbedder(paths, read, normaliser(MEAN, STD, 16), CPU, "fp32", 4, 0).embed(backbone)
            (tmp_path / f"raised{distributed.rank()}").touch()

    assert exit_codes(fork_group(work, 2)) == [0, 0]
    assert len(list(tmp_path.glob("raised*"))) == 2
