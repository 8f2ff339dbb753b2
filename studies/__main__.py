"""The door of all that is not in the paper: `python -m studies` lists the studies."""

from plumbing.console import steady_process
from studies.commands import main, study_args

if __name__ == "__main__":
    steady_process()
    main(study_args())
