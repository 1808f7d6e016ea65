"""Its presence puts this folder on the path: what several kinds of tests share lies here."""
