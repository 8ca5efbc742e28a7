"""What the main job does with an autoencoder before it trains, and its refusals.

A whole run in latents is among the tests of the job.
"""

import numpy as np
import pytest
import train_dit
from dit_training import autoencoder, data

from fusionopt_jax.dit import latents
from tests import _compare
from tests.dit import _folders
from tests.examples._autoencoders import write_autoencoder, write_pictures


@pytest.fixture(scope="module")
def coder_folder(tmp_path_factory):
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "images.npz")


def error_line(capsys):
    """What was printed as the error, which must be a single line."""
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if "error:" in line
    ]
    return line


def test_grey_images_fill_every_channel(coder_folder, tmp_path):
    coder = autoencoder.load(str(coder_folder))
    grey = data.load(
        str(write_pictures(tmp_path / "grey.npz", (8, 8, 1))), keep_bytes=True
    )
    assert grey.train_images.dtype == np.uint8
    assert coder.latent_shape(grey.train_images, "grey.npz") == (4, 4, 1)
    encoded = coder.encoded(grey, tmp_path / "latents.npz")
    pixels = data.bytes_to_unit_range(grey.held_out_images).repeat(3, axis=-1)
    wanted = latents.encode(coder.params, coder.config, pixels)
    # Calls of another batch size take sums in another order.
    _compare.assert_within(encoded.held_out_images, wanted, 1e-5)


class TestRefusals:
    def refused(self, capsys, tmp_path, source, folder, says, *arguments):
        out = tmp_path / "run"
        given = ["--data", str(source), "--latents", str(folder), *arguments]
        assert train_dit.main([*given, "--out", str(out)]) == 2
        assert says in error_line(capsys)
        assert not out.exists()

    def test_no_folder(self, capsys, tmp_path, images):
        says = "--latents nowhere: no such folder"
        self.refused(capsys, tmp_path, images, "nowhere", says)

    def test_another_model(self, capsys, tmp_path, images):
        _folders.write_json(tmp_path / "config.json", _folders.TRANSFORMER)
        _folders.write_weights(tmp_path, _folders.transformer_arrays())
        says = "is of DiTTransformer2DModel, not of AutoencoderKL"
        self.refused(capsys, tmp_path, images, tmp_path, says)

    def test_only_a_decoder(self, capsys, tmp_path, images):
        half = write_autoencoder(tmp_path / "half", without=("encoder", "quant_conv"))
        says = "it has no encoder to encode images with"
        self.refused(capsys, tmp_path, images, half, says)

    def test_sides(self, capsys, tmp_path, coder_folder):
        source = write_pictures(tmp_path / "odd.npz", (9, 9, 3))
        says = "images of 9x9 pixels can't be encoded; their sides must be divisible by"
        self.refused(capsys, tmp_path, source, coder_folder, says)

    def test_channels(self, capsys, tmp_path, coder_folder):
        source = write_pictures(tmp_path / "rgba.npz", (8, 8, 4))
        says = "images of 4 channels can't be encoded; this autoencoder takes 3"
        self.refused(capsys, tmp_path, source, coder_folder, says)

    def test_patches(self, capsys, tmp_path, coder_folder, images):
        says = "it does not divide the latent side of 4; give one of 1, 2, 4"
        self.refused(capsys, tmp_path, images, coder_folder, says, "--patch-size", "8")
