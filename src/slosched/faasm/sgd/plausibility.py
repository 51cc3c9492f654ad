"""scikit-learn's linear SVM on the same examples: it says whether losses and accuracies are plausible.

SGDClassifier decays its rate and shrinks all weights in each step, so only the neighbourhood can agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slosched.clock import now_ns
from slosched.errors import MissingPackage
from slosched.faasm.sgd.examples import Examples
from slosched.faasm.sgd.measure import judged
from slosched.units import NS_PER_S

#: The value with the smallest hinge loss is taken: ours has another regularisation.
_ALPHAS = (1e-7, 1e-6, 1e-5, 1e-4)


def by_scikit_learn(examples: Examples, *, epochs: int, seed: int) -> dict[str, Any]:
    """Losses and accuracy as those of a training. Raises MissingPackage without scikit-learn."""
    try:
        import sklearn
        from scipy.sparse import csr_matrix
        from sklearn.linear_model import SGDClassifier
    except ImportError as error:
        raise MissingPackage(
            f"the check needs scikit-learn ({error}): pip install 'slosched[faasm]'"
        ) from error
    rows = examples.train
    shape = len(rows), examples.features
    matrix = csr_matrix((rows.values, rows.columns, rows.offsets), shape=shape)
    if len(np.unique(rows.labels)) < 2:
        return {"version": sklearn.__version__, "why": "all examples have one label"}
    found: list[dict[str, Any]] = []
    for alpha in _ALPHAS:
        model = SGDClassifier(
            loss="hinge",
            alpha=alpha,
            max_iter=epochs,
            tol=None,
            fit_intercept=False,
            random_state=seed,
        )
        began_ns = now_ns()
        model.fit(matrix, rows.labels)
        train_s = (now_ns() - began_ns) / NS_PER_S
        weights = np.ascontiguousarray(model.coef_[0], np.float64)
        found.append({"alpha": alpha, "train_s": train_s, **judged(examples, weights)})
    best = min(found, key=lambda each: float(each["arrived_loss"]))
    return {"version": sklearn.__version__, **best}
