"""Writing quantised files: plan, conversion, journal, importance of columns, report."""
