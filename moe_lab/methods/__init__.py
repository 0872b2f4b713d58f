"""Methods: from statistics to a plan that says what happens to each layer.

A method has `check(layers)`, which refuses an impossible request before any work, and
`plan(evidence)`. It may have `identity(options)`, what of its composed options the plan depends on
(all by default); `example(layers)`, edits of the kind that the plan will have, by which a recipe
and the form of the result are judged before any work; `code()`, the modules and objects that decide
the plan beside itself; `from_routers`, true where the routers' statistics are enough for it; and
`takes_groups`, true where it makes a plan for each group of the calibration set.
"""
