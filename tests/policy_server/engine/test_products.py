"""Both ways to compute with a weight in oneDNN's order give what torch's own linear layer gives."""

from __future__ import annotations

import pytest
import torch

from policy_server.engine.products import Convolution, InnerProduct, Product


@pytest.fixture(scope="module", params=["inner product", "convolution", "convolution, from more to fewer"])
def product(request: pytest.FixtureRequest) -> Product:
    if request.param == "inner product":
        return InnerProduct()
    return Convolution(*((320, 96) if request.param == "convolution" else (96, 384)))


def shape_of(product: Product) -> tuple[int, int]:
    return product.shape if isinstance(product, Convolution) else (320, 96)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 17, 31, 32, 33, 40, 64, 65, 255, 257, 600])
def test_any_number_of_rows_gets_the_linear_layers_outputs(product: Product, rows: int, bias: bool) -> None:
    shape = shape_of(product)
    generator = torch.Generator().manual_seed(rows)
    weight, inputs = (torch.randn(size, generator=generator) for size in (shape, (rows, shape[1])))
    added = torch.randn(shape[0], generator=generator) if bias else None
    outputs = product(inputs, product.pack(weight), added)
    torch.testing.assert_close(outputs, torch.nn.functional.linear(inputs, weight, added), rtol=1e-4, atol=1e-4)
    assert outputs.is_contiguous()


def test_more_dimensions_and_views_are_rows_too(product: Product) -> None:
    shape = shape_of(product)
    weight, inputs = torch.randn(shape), torch.randn(7, shape[1], 5).transpose(1, 2)
    outputs = product(inputs, product.pack(weight), None)
    torch.testing.assert_close(outputs, torch.nn.functional.linear(inputs, weight), rtol=1e-4, atol=1e-4)
    assert outputs.shape == (7, 5, shape[0])


def test_rows_of_a_view_are_found_where_they_lie(product: Product) -> None:
    shape = shape_of(product)
    weight, wider = torch.randn(shape), torch.randn(12, shape[1] + 8)
    for inputs in (wider[:, 4:-4], wider[::3, 8:], wider.new_zeros(shape[1], 12).normal_().t()):
        outputs = product(inputs, product.pack(weight), None)
        torch.testing.assert_close(outputs, torch.nn.functional.linear(inputs, weight), rtol=1e-4, atol=1e-4)
