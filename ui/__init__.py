"""The page: a Streamlit app that knows the prediction API and nothing else of the platform."""
