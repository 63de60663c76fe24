"""Constraints: from a regular expression, a JSON schema or a choice to an automaton over tokens.

``compile.compile_grammar`` does it, ``vocabulary.Vocabulary`` is what it needs to know of a
tokenizer, ``grammar.TokenGrammar`` is what comes out, and ``cache.GrammarCache`` keeps it.
"""
