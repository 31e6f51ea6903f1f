"""Distillation systems as recipe files: `catalogue` holds them, what they name is in `parts`.

recipe, yaml_file, fields, besides   the file and its fields
parts                                names of objectives, views, students, criteria
checking                             all of it with the models at hand, before anything is trained
distilling                           builds, trains stage by stage, quantizes, packs
sources, students, map_search        data, students with tokens of their own, searched layer maps
"""
