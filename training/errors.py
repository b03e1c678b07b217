"""What goes wrong in training, in words for the person who has to mend it."""


class TrainingError(Exception):
    """Training can't go on; the message names the table, run or version and what to do."""


class TrackingLostError(TrainingError):
    """The MLflow server does not answer; finished runs are kept locally."""
