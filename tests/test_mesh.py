"""Sizes, indices and groups of a mesh, against a grid of NumPy."""

import numpy as np
import pytest

import keras_ring
from keras_ring.distribution.mesh import AXES, BATCH, MODEL, SEQUENCE, Mesh

pytestmark = pytest.mark.once
SHAPES = [(1, 1, 1), (2, 3, 1), (4, 1, 1), (2, 3, 2), (1, 2, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mesh_is_a_grid(shape):
    mesh, grid = Mesh(shape), np.arange(np.prod(shape)).reshape(shape)
    assert mesh.size() == grid.size
    for place in np.ndindex(*shape):
        rank = mesh.rank(**dict(zip(AXES, place, strict=True)))
        assert rank == grid[place]
        assert tuple(mesh.index(rank, axis) for axis in AXES) == place
    for number, axis in enumerate(AXES):
        lines = np.moveaxis(grid, number, -1).reshape(-1, shape[number])
        assert mesh.size(axis) == shape[number]
        assert mesh.groups(axis) == lines.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_over_several_axes(shape):
    mesh, grid = Mesh(shape), np.arange(np.prod(shape)).reshape(shape)
    assert mesh.groups(*AXES) == [grid.ravel().tolist()]
    assert mesh.groups() == [[rank] for rank in grid.ravel()]
    both = np.moveaxis(grid, 1, -1)  # batch, model, seq
    expected = [sorted(both[i].ravel()) for i in range(shape[0])]
    assert mesh.groups(SEQUENCE, MODEL) == expected
    assert mesh.size(BATCH, MODEL) == shape[0] * shape[2]
    for rank in range(grid.size):
        (own,) = (g for g in mesh.groups(BATCH) if rank in g)
        assert mesh.group(rank, BATCH) == own


def test_a_strategy_lays_itself_out():
    strategy = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=-1
    )
    assert strategy.mesh(8) == Mesh((2, 4, 1))
    assert strategy.mesh_shape(8) == (2, 4)
