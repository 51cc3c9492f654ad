"""scikit-learn's linear SVM on the same examples: it says whether losses and accuracies are plausible.

SGDClassifier decays its rate and shrinks all weights in each step, so only the neighbourhood can agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slosched.clock import now_ns
from slosched.errors import InvalidConfig, MissingPackage
from slosched.faasm.sgd.examples import Examples
from slosched.faasm.sgd.measure import judged
from slosched.units import NS_PER_S

#: Its regularisation is another one, so several strengths are tried.
_ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3)


def by_scikit_learn(examples: Examples, *, epochs: int, seed: int) -> list[dict[str, Any]]:
    """Loss and accuracy as those of a training, for each `alpha` (the strength of the regularisation).

    Raises MissingPackage without scikit-learn, InvalidConfig if all examples have one label.
    """
    try:
        import sklearn
        from scipy.sparse import csr_matrix
        from sklearn.linear_model import SGDClassifier
    except ImportError as error:
        raise MissingPackage(
            f"the check needs scikit-learn ({error}): pip install 'slosched[faasm]'"
        ) from error
    rows = examples.train
    if len(np.unique(rows.labels)) < 2:
        raise InvalidConfig("all examples have one label")
    shape = len(rows), examples.features
    matrix = csr_matrix((rows.values, rows.columns, rows.offsets), shape=shape)
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
        fit_s = (now_ns() - began_ns) / NS_PER_S
        weights = np.ascontiguousarray(model.coef_[0], np.float64)
        found.append(
            {
                "alpha": alpha,
                "fit_s": fit_s,
                "version": sklearn.__version__,
                **judged(examples, weights),
            }
        )
    return found
