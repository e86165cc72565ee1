"""One small file a data set: its field names mapped to our records.

The functions named `pairs`, `points`, `completions` and `prompts` take an iterator of numbered rows
and give another, in the form that a reader knows; readers take them as `corpus`, and configs by
name, such as "helpsteer3.pairs". A function of your own is named "my_package.my_module:function".
"""
