"""Opening a model, and every value inside a mixer: sites, the pass through one layer, the scan, the mixer as an object."""
