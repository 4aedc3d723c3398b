"""The methods paragraph contains the settings and versions that are needed to reproduce a run."""

from dino.config.load import load_config, to_dict
from dino.config.schema import PatchConfig, RegionConfig
from dino.report.methods import Facts, Run, Tiling, methods


def facts(**changes):
    patch = to_dict(PatchConfig(seed=41))
    patch["aug"] |= {"quarter_turns": True, "vertical_flip": 0.5, "hed_jitter": 0.5}
    geometry = {"spacing_um": 0.5, "tile_size_px": 256, "overlap": 0.5, "region_size_px": 1024, "min_tissue": 0.25}
    given = {
        "tiling": Tiling(1, 352, 40, geometry),
        "patch": Run(patch, 240, 64, 192, 12, 3),
        "region": Run(to_dict(RegionConfig(seed=42)), 200, 32, 192, 6, 6),
        "versions": {"histodino": "9.8.7", "torch": "2.99.1", "hs2p": "6.1.0"},
        "device": "2 CPU cores",
    }
    return Facts(**{**given, **changes})


def test_methods_has_versions_seeds_and_settings():
    text = methods(facts())
    for piece in (
        "histodino 9.8.7", "torch 2.99.1", "hs2p 6.1.0", "seed 41", "seed 42", "240 steps", "200 steps", "352 tiles",
        "0.5 µm per pixel", "1024 x 1024 px", "global batch of 64", "peak learning rate of 0.000125", "AdamW",
        "65,536 prototypes", "drop-path rate 0.1", "90° rotations", "HED stain jitter (±0.05, p 0.5)",
        "horizontal and vertical flips", "224 px", "Caron et al. 2021", "Chen et al. 2022", "2 CPU cores",
    ):  # fmt: skip
        assert piece in text
    assert "\n" not in text


def test_parts_that_are_none_are_omitted():
    text = methods(facts(region=None, tiling=None))
    assert "HIPT" not in text
    assert "hs2p 6.1.0" in text  # as a version
    assert "cut into" not in text


def test_a_distilled_run_names_its_teacher_and_no_prototypes():
    config = to_dict(PatchConfig(teacher="timm:vit_large_patch14_dinov2"))
    config["objective"]["dino"] = 0.0
    text = methods(facts(patch=Run(config, 240, 64, 384, 12, 6), region=None))
    assert "by distilling the features of timm:vit_large_patch14_dinov2 (cosine distance between its cls tokens" in text
    assert "prototypes" not in text and "Caron" not in text and "teacher momentum 0.996" in text


def test_the_precision_is_the_one_that_the_run_computed_in():
    config = to_dict(PatchConfig())
    assert "bf16 precision." in methods(facts(patch=Run(config, 240, 64, 384, 12, 6), region=None))
    computed = Run(config, 240, 64, 384, 12, 6, precision="fp32")
    assert "fp32 precision." in methods(facts(patch=computed, region=None))


def test_all_parts_of_the_objective_and_the_scaled_learning_rate_are_named():
    config = to_dict(load_config(PatchConfig, recipe="patch_continue", overrides={"objective.regression": 0.5}))
    text = methods(facts(patch=Run(config, 240, 256, 384, 12, 6), region=None))
    for piece in (
        "with DINO (Caron et al. 2021) and iBOT on masked tokens (Zhou et al. 2022; weight 1)", "weight 0.5)",
        "Wang & Isola 2020; weight 0.005)", "Sinkhorn-Knopp targets", "peak learning rate of 0.00014 (",
        "layer-wise decay 0.7", "factor 0.2 for the patch embedding",
    ):  # fmt: skip
        assert piece in text
    assert "KoLeo" not in text


def test_numbers_of_one_are_singular_and_sentences_start_with_a_capital():
    config = to_dict(PatchConfig(seed=41))
    config["training"]["warmup_epochs"] = 1
    text = methods(facts(patch=Run(config, 240, 64, 192, 12, 3), region=None))
    assert "(1 epoch of linear warm-up" in text
    assert text.startswith("One whole-slide image was read")
    assert " of One " not in text and all(part[0].isupper() for part in text.split(". ") if part[0].isalpha())
