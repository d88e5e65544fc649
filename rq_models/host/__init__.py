"""What runs beside the model: standard library only, Python 3.8 and newer.

A horse loads this folder by its path, under the name ``_rq_models_host``, with whatever interpreter the model needs; so
the modules here import each other relatively, and nothing else of rq_models.
"""
