"""A report on a model or on every variant: what is measured, the charts, and the page. Needs the extra ``report``."""
