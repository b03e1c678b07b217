{{ select_split('validation') }}
