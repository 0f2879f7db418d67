r"""Tree-structured probabilistic circuits."""

from .builders import binary_tree as binary_tree
from .builders import chain as chain
from .builders import quad_tree as quad_tree
from .chowliu import chow_liu_parents as chow_liu_parents
from .chowliu import hidden_chow_liu_tree as hidden_chow_liu_tree
from .chowliu import mutual_information as mutual_information
from .circuit import TreeCircuit as TreeCircuit
from .exact import enumerate_joint as enumerate_joint
from .exact import enumerate_values as enumerate_values
from .inputs import Categorical as Categorical
from .inputs import Discrete as Discrete
from .inputs import Gaussian as Gaussian
from .inputs import Input as Input
from .ordinal import Bernoulli as Bernoulli
from .ordinal import Binomial as Binomial
from .ordinal import DiscretisedLogistic as DiscretisedLogistic
from .queries import MostProbable as MostProbable
from .queries import conditional_log_prob as conditional_log_prob
from .queries import conditional_sample as conditional_sample
from .queries import leave_one_out as leave_one_out
from .queries import most_probable as most_probable
from .queries import posterior as posterior
from .queries import sample as sample
from .structure import Tree as Tree
