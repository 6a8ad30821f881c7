"""Studies: several runs or passes that answer one question; each resumes and says what it measured."""
