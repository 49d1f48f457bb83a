"""Robots: environments, data sets, experts, diffusion and flow policies, their composition and their evaluation.

Modules: envs (vector layer), datasets (formats), experts and collect (demonstrations), policies (diffusion, flow),
compose (GPC, `fit_weights`), loading (policies by name, also of LeRobot and robomimic), evaluate (rates, pairs).
"""
