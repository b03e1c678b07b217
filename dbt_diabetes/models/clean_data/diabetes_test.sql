{{ select_split('test') }}
