import os
def loop_rules(rules, kernel, device, dtype, D):
    return rules
