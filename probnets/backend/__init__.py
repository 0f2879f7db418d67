r"""The tensor backend that all cores share.

Everything here is written once against PyTorch, which defines the result. Some inner loops have
a compiled twin, which stands in wherever nobody can tell the difference.
"""

from .dispatch import compiled as compiled
from .fixedpoint import fixed_point as fixed_point
from .implicit import implicit_fixed_point as implicit_fixed_point
from .krylov import conjugate_gradient as conjugate_gradient
from .krylov import gmres as gmres
from .logspace import log_matmul as log_matmul
from .segments import segment_logsumexp as segment_logsumexp
from .segments import segment_sum as segment_sum
from .simplex import Groups as Groups
from .simplex import grouped_softmax as grouped_softmax
from .simplex import project_tangent as project_tangent
from .simplex import softmax_jvp as softmax_jvp
from .solution import Solution as Solution
