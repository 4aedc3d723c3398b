import numpy as np
import pytest
import torch

from dino.distributed import assign
from dino.extraction.pixels import RegionImage, read_region_image
from dino.extraction.regions import Reading, is_written, plan_cells, plan_images, write_features, write_regions
from dino.slides.tables import RegionRecord, region_path


def region(x, y, grid=(2, 3)):
    return RegionRecord("s", x, y, 10, grid, 0.5, region_path("s", x, y), np.ones(grid, np.float32))


def test_cells_of_several_regions_are_planned_once():
    plan = plan_cells([region(0, 0), region(10, 0), region(10, 10)])
    assert len(set(plan.units)) == len(plan.units) == plan.cells == 11
    for record, rows in zip([(0, 0), (10, 0), (10, 10)], plan.rows, strict=True):
        wanted = [(record[0] + 10 * j, record[1] + 10 * i) for i in range(2) for j in range(3)]
        assert [plan.units[i] for i in rows] == wanted


def test_regions_are_written_as_soon_as_their_cells_are_embedded(tmp_path):
    plan = plan_cells([region(0, 0, (1, 2)), region(10, 0, (1, 2)), region(90, 0, (1, 2))])
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    existing = []

    def embedder(batches):
        for batch in batches:
            existing.append([p.exists() for p in paths])
            yield batch[:, :, 0, 0].float()

    def read(cell):
        return torch.full((1, 3, 4, 4), cell[0], dtype=torch.uint8)

    write_regions(plan, paths, read, embedder, Reading(1, 0, 1))
    assert existing == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert [torch.load(p)[:, 0].tolist() for p in paths] == [[0, 10], [10, 20], [90, 100]]


def test_nothing_is_read_after_the_slide_was_closed(tmp_path):
    closed, late = [], []

    def read(cell):
        late.extend(closed)
        return torch.zeros(1, 3, 4, 4, dtype=torch.uint8)

    def embedder(batches):
        yield next(iter(batches)).float().mean((2, 3))
        raise ValueError("the model broke down")

    with pytest.raises(ValueError):
        write_regions(plan_cells([region(0, 0, (8, 8))]), [tmp_path / "a.pt"], read, embedder, Reading(4, 2, 4))
    closed.append(1)
    assert not late and not list(tmp_path.iterdir())


def test_region_images_are_cut_row_major(tmp_path):
    from PIL import Image

    pixels = np.zeros((8, 12, 3), np.uint8)
    for i in range(2):
        for j in range(3):
            pixels[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = (i, j, 7)
    Image.fromarray(pixels).save(tmp_path / "s_0_0.png")
    image = RegionImage(tmp_path / "s_0_0.png", region(0, 0))
    cells = read_region_image(image, 4)
    assert cells.shape == (6, 3, 4, 4)
    assert cells[:, :2, 0, 0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert plan_images([image, image]).rows[1].tolist() == [6, 7, 8, 9, 10, 11]


def test_views_are_written_without_the_rest_of_their_storage(tmp_path):
    big = torch.randn(1000, 8)
    write_features(tmp_path / "a.pt", big[10:14])
    assert torch.load(tmp_path / "a.pt").untyped_storage().nbytes() == 4 * 8 * 4
    assert is_written(tmp_path / "a.pt", 4, 8)
    assert not is_written(tmp_path / "a.pt", 4, 9)
    (tmp_path / "a.pt").write_bytes(b"damaged")
    assert not is_written(tmp_path / "a.pt", 4, 8)


def test_items_are_assigned_once_and_evenly():
    sizes = [5, 1, 9, 3, 3, 0, 7]
    taken = assign(sizes, 3)
    assert sorted(i for share in taken for i in share) == list(range(7))
    assert [sum(sizes[i] for i in share) for share in taken] == [9, 10, 9]
    assert assign([], 2) == [[], []]
