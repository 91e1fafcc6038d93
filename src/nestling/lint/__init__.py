"""What is wrong with a source before anything is trained on it: one function per check, evidence by row, and a mend."""

from nestling.lint.finding import SEVERITY as SEVERITY
from nestling.lint.finding import Finding as Finding
from nestling.lint.run import Report as Report
from nestling.lint.run import lint as lint
