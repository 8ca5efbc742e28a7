"""Key paths as names."""

import jax

from fusionopt_jax._paths import named_leaves, path_keys


def test_paths_are_names_without_the_value_of_a_variable():
    keys = jax.tree_util
    path = (keys.DictKey("layers"), keys.SequenceKey(0), keys.GetAttrKey("kernel"))
    assert path_keys(path) == ("layers", "0", "kernel")
    assert path_keys((*path, keys.GetAttrKey("value"))) == path_keys(path)
    attention = (keys.DictKey("attention"), keys.DictKey("value"))
    assert path_keys(attention) == ("attention", "value")
    assert path_keys((keys.FlattenedIndexKey(2),)) == ("2",)
    # A field of a state is called what it is called.
    assert path_keys((keys.GetAttrKey("value"),)) == ("value",)


def test_leaves_are_named_in_the_order_of_the_tree():
    tree = {"b": [1, {"c": 2}], "a": 3, "hole": None}
    assert named_leaves(tree) == [("a", 3), ("b/0", 1), ("b/1/c", 2)]
    assert named_leaves(4) == [("", 4)]
