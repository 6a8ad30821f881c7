"""Studies: several runs or passes that answer one question and say what they measured; compare and lr resume, rank begins anew."""
