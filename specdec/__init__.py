"""specdec"""
