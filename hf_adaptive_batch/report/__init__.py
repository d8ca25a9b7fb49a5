"""Report: the run's records, its picture and its summary. Import them by module."""
