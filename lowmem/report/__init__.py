"""Reports on models and variants: measurements, charts and the HTML page. Needs the extra ``report``."""
